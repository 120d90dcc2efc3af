"""Effect of the stability loss on distillation: the reasoner's dense model is converted and distilled again.

    python -m experiments.stability_distil --out runs/stability_distil

For every weight of the stability loss the same compact model is distilled on the same problems. Reported are correct
answers, perplexity, and the distance of the growth along depth from the dense model's: the root mean square, over
held-out tokens and layers, of the difference of the two logarithmic growths (`DepthStability.growth`), with directions
that training did not use. The same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reasoner.problems import make_rows, make_tokenizer
from experiments.reasoner.run import Settings, architecture, evaluate, fit
from ngc_jax.commands.console import console, table
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.files import write_json
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import save_model
from ngc_jax.stability.depth import depth_stability
from ngc_jax.training.fresh import fresh_model

SETTINGS = Settings(
    width=96, layers=4, chain=3, operands=10, rows=32, length=64, steps=700, distil_steps=150, problems=300
)


def distance(student: LanguageModel, teacher: LanguageModel, seed: int) -> float:
    """Root mean square difference of logarithmic growth over held-out tokens and layers."""
    rng = np.random.default_rng([seed, 10**6 + 2])
    tokens = jnp.asarray(make_rows(rng, 16, SETTINGS.length, SETTINGS.chain, SETTINGS.operands)[0])
    key = jax.random.key(seed + 10**6)
    grown = [depth_stability(m.decoder, m.params, tokens, key=key, directions=8).growth for m in (student, teacher)]
    return float(jnp.sqrt(jnp.mean(jnp.square(grown[0] - grown[1])[:, 1:, 1:])))


def measure(compact: LanguageModel, dense: LanguageModel, weight: float | None, seed: int) -> dict[str, Any]:
    """Distil with a weight of the stability loss, or not at all if None, and evaluate."""
    began, student = time.perf_counter(), compact
    if weight is not None:
        student = fit(
            compact, SETTINGS, seed + 1000, f"weight {weight:g}", steps=SETTINGS.distil_steps,
            learning_rate=SETTINGS.distil_rate, teacher=dense, stability=weight,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    return {**evaluate(student, SETTINGS, seed), "distance": distance(student, dense, seed), "seconds": seconds}


def _dense(directory: Path, seed: int) -> LanguageModel:
    if not (directory / "config.json").exists():
        fresh = fresh_model(architecture(SETTINGS), make_tokenizer, jax.random.key(seed), name="reasoner")
        done = fit(fresh, SETTINGS, seed, "train", steps=SETTINGS.steps, learning_rate=SETTINGS.learning_rate)
        save_model(done, directory)
    return load_model(str(directory))


def _compact(dense: LanguageModel, keep: float, seed: int) -> LanguageModel:
    rng = np.random.default_rng([seed, 10**6 + 1])
    calibration = make_rows(rng, 256, SETTINGS.length, SETTINGS.chain, SETTINGS.operands)[0].ravel()
    return convert(dense, Recipe("ngc", keep=keep), calibration, window=SETTINGS.length, batch_size=32)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability_distil"))
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0, 10.0])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.4])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        dense = _dense(arguments.out / f"seed-{seed}", seed)
        for keep in arguments.keeps:
            compact = None
            for weight in (None, *arguments.weights):
                file = arguments.out / f"seed-{seed}" / f"{keep:g}-{weight}.json"
                if not file.exists():
                    compact = compact or _compact(dense, keep, seed)
                    write_json(file, measure(compact, dense, weight, seed))
                row = json.loads(file.read_text(encoding="utf-8"))
                rows.append({"seed": seed, "keep": keep, "weight": weight, **row})
                console.print(json.dumps(rows[-1]))
    write_json(arguments.out / "results.json", {"rows": rows})
    kinds = dict.fromkeys((row["keep"], row["weight"]) for row in rows)
    cells = []
    for keep, weight in kinds:
        same = [row for row in rows if (row["keep"], row["weight"]) == (keep, weight)]
        values = [
            [f"{100 * row['right'] / row['problems']:.1f}", f"{row['perplexity']:.4f}", f"{row['distance']:.4f}"]
            for row in same
        ]
        name = "not distilled" if weight is None else f"{weight:g}"
        cells.append([f"{keep:g}", name, *(" / ".join(column) for column in zip(*values, strict=True))])
    console.print(table("by seed", ["keep", "weight", "right, %", "perplexity", "distance of growth"], cells))


if __name__ == "__main__":
    main()
