"""Accuracy of image classifiers after conversion, by method and keep ratio.

    python -m experiments.vision --out runs/vision
    python -m experiments.vision --model google/vit-base-patch16-224 --calibration photos/train --images photos/test

The first command trains a ViT of 6 layers on scikit-learn's digits (nothing is downloaded) and converts it; about five
minutes on 2 cores. The second converts another classifier, calibrated on one folder of images and tested on another,
whose sub-folders are classes. Needs the extras `vision` and `report`, and scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.vision.digits import Labelled, load_digits, train_digits
from ngc_jax.commands.console import console, progress_bar, table
from ngc_jax.commands.images import IMAGES, spread
from ngc_jax.conversion import Calibration, convert
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.images import evaluate_images, labelled_files
from ngc_jax.files import write_json
from ngc_jax.models.load import load_model
from ngc_jax.models.preprocessing import image_files
from ngc_jax.models.save import save_model
from ngc_jax.models.vision import VisionModel
from ngc_jax.reporting.charts import Lines, Series

# Of digits, of which there are 17,000 in all; a class is known from few of them.
DIGIT_TOKENS = 8192
KEEPS = (0.9, 0.8, 0.6, 0.4)
# Name in the table -> method and options. The last two give a plain ViT.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "svd_llm": ("svd_llm", {}),
    "basis_sharing": ("basis_sharing", {}),
    "ngc_paper": ("ngc_paper", {}),
    "nystrom": ("nystrom", {}),
    "ngc": ("ngc", {}),
    "nystrom, dense": ("nystrom", {"form": "dense"}),
    "ngc, dense": ("ngc", {"form": "dense"}),
}


def measured(model: VisionModel, test: Labelled) -> dict[str, Any]:
    """Accuracy with its interval, and loss."""
    found = evaluate_images(model, test.pixels, test.labels, batch_size=64)
    return {"correct": found.correct, "accuracy": found.accuracy, "interval": list(found.interval), "loss": found.loss}


def _report(bar: Callable[[int, int, str], None], stage: str, done: int, total: int) -> None:
    bar(done, total, stage)


def convert_by_all(
    model: VisionModel, calibration: Calibration, test: Labelled, methods: Sequence[str], keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for every method and keep ratio; one that a method cannot reach has a reason in place of figures."""
    rows = []
    for name in methods:
        method, options = METHODS[name]
        for keep in keeps:
            started = time.perf_counter()
            row: dict[str, Any] = {"method": name, "keep": keep}
            try:
                with progress_bar(f"{name} {keep:g}") as bar:
                    compact: Any = convert(
                        model,
                        method,
                        calibration,
                        keep=keep,
                        progress=partial(_report, bar),
                        **options,
                    )
            except UsageError as error:
                rows.append({**row, "refused": str(error)})
                continue
            assert compact.plan is not None
            seconds = time.perf_counter() - started
            row |= {"stored": compact.plan.keep_ratio(), "parameters": compact.count_parameters(), "seconds": seconds}
            rows.append({**row, **measured(compact, test)})
    return rows


def chart(rows: Sequence[dict[str, Any]], dense: dict[str, Any]) -> Lines:
    """Accuracy by keep ratio, a line for each method, with Wilson's intervals."""
    series = []
    for style, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == name and "accuracy" in row]
        own.sort(key=lambda row: row["stored"])
        series.append(
            Series(
                name,
                tuple(row["stored"] for row in own),
                tuple(row["accuracy"] for row in own),
                style=style,
                markers=True,
                low=tuple(row["interval"][0] for row in own),
                high=tuple(row["interval"][1] for row in own),
            )
        )
    return Lines(
        "Accuracy after conversion",
        "Top-1 accuracy by the share of parameters that is stored, a line for each method, with 95 % intervals.",
        "keep ratio",
        "top-1 accuracy",
        tuple(series),
        rules=((dense["accuracy"], "dense"),),
    )


def show(rows: Sequence[dict[str, Any]], dense: dict[str, Any]) -> None:
    """Print the table."""
    lines = [["dense", "1", f"{dense['accuracy']:.4f}", _interval(dense), f"{dense['loss']:.4f}", ""]]
    for row in rows:
        if "refused" in row:
            lines.append([row["method"], f"{row['keep']:g}", "", row["refused"][:60], "", ""])
            continue
        figures = [f"{row['accuracy']:.4f}", _interval(row), f"{row['loss']:.4f}", f"{row['seconds']:.0f}"]
        lines.append([row["method"], f"{row['stored']:.3f}", *figures])
    columns = ["method", "kept", "accuracy", "95 % interval", "loss", "s"]
    console.print(table("Top-1 accuracy after conversion", columns, lines))


def _interval(row: dict[str, Any]) -> str:
    return "{:.4f}-{:.4f}".format(*row["interval"])


def read(options: argparse.Namespace) -> tuple[VisionModel, Any, Labelled]:
    """The classifier, images to calibrate on and those to test with."""
    if options.model is None:
        train, test = load_digits()
        with progress_bar("train") as bar:
            model = train_digits(train, epochs=options.epochs, progress=bar)
        chosen = slice(options.test_images)
        return model, train.pixels, Labelled(test.pixels[chosen], test.labels[chosen])
    if options.images is None or options.calibration is None:
        raise UsageError("a model of one's own needs --calibration and --images, two directories of images")
    loaded = load_model(options.model)
    if not isinstance(loaded, VisionModel):
        raise UsageError(f"{options.model} is a language model; give an image classifier")
    files, labels = labelled_files(options.images, loaded.labels)
    count = min(len(files), options.test_images or len(files))
    index = np.arange(count) * len(files) // count
    test = Labelled(loaded.preprocessor.load([files[place] for place in index]), labels[index])
    return loaded, loaded.preprocessor.load(spread(image_files(options.calibration), IMAGES)), test


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train or load, convert, print the table, write results.json and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vision"), help="for results.json and the picture")
    parser.add_argument("--model", help="a classifier's directory or hub id, in place of one trained on digits")
    parser.add_argument("--calibration", help="directory of images to calibrate that model on")
    parser.add_argument("--images", help="directory of images to test that model with, in sub-folders by class")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS), help="keep ratios")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="rows of the table")
    parser.add_argument("--epochs", type=int, default=60, help="of training on digits")
    parser.add_argument("--test-images", type=int, help="number of test images; all by default")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    model, images, test = read(options)
    if options.model is None:
        save_model(model, options.out / "model", overwrite=True)
    dense = measured(model, test)
    console.print(f"dense: accuracy {dense['accuracy']:.4f} ({_interval(dense)}) on {len(test.labels)} images")
    counts = () if options.model else ("gradient_tokens", "propagation_tokens")
    tokens: dict[str, Any] = dict.fromkeys(counts, DIGIT_TOKENS)
    calibration = Calibration.of(model, images, **tokens)
    rows = convert_by_all(model, calibration, test, options.methods, options.keep)
    show(rows, dense)
    settings = {"model": options.model or "digits", "epochs": options.epochs, "test_images": len(test.labels)}
    settings |= {"parameters": model.count_parameters(), "seconds": time.perf_counter() - started}
    results = {"settings": settings, "dense": dense, "rows": rows}
    write_json(options.out / "results.json", results)
    from ngc_jax.reporting.render.figures import save_figure
    from ngc_jax.reporting.render.plots import draw

    picture = save_figure(draw(chart(rows, dense)), options.out / "accuracy.png")
    console.print(f"{settings['seconds']:.0f} s; {options.out / 'results.json'} and {picture}")
    return results


if __name__ == "__main__":
    main()
