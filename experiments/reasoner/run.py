"""Preservation of reasoning: a small transformer that does sums with written working, converted and distilled.

Trains a dense model until it answers most held-out problems correctly, converts it by every method at every keep ratio,
distils each on the same new problems, and writes exact-match accuracy and perplexity as a table and a picture.

    python -m experiments.reasoner.run --out runs/reasoner             # about an hour on 2 cores
    python -m experiments.reasoner.run --quick --out runs/reasoner     # minutes; the dense model is far from done

The same command continues an interrupted run: finished parts are in OUT/full-seed-*/ or OUT/quick-seed-*/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest

from experiments.reasoner.problems import (
    ALPHABET,
    END,
    Problem,
    ProblemBatches,
    encode,
    make_problem,
    make_rows,
    make_tokenizer,
)
from ngc_jax.commands.console import console, progress_bar
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.files import write_json
from ngc_jax.models.generate import generate
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import save_model
from ngc_jax.training.fresh import fresh_model
from ngc_jax.training.loop import LoopConfig, Placed, train
from ngc_jax.training.losses import Objective, objective_sums
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.sharding import make_mesh
from ngc_jax.training.step import Constants, Program
from ngc_jax.training.trainable import merge_params, split_params

METHODS = ("svd", "svd_llm", "basis_sharing", "ngc_paper", "ngc")
KEEPS = (0.8, 0.6, 0.4, 0.2, 0.1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        width: Of the residual stream; the MLP has 8/3 of that.
        layers: Of the model.
        chain: Operations in a problem.
        operands: Upper limit of the added or subtracted numbers, exclusive.
        length: Tokens of a row.
        rows: Of a step.
        steps: Training steps of the dense model.
        learning_rate: Of the dense model's training.
        distil_steps: Steps of every distillation.
        distil_rate: Learning rate of every distillation; the same for all methods.
        problems: Held-out problems to answer.
        calibration_rows: Number of rows for calibration.
    """

    width: int = 192
    layers: int = 4
    chain: int = 3
    operands: int = 100
    length: int = 96
    rows: int = 32
    steps: int = 1800
    learning_rate: float = 2e-3
    distil_steps: int = 80
    distil_rate: float = 3e-4
    problems: int = 500
    calibration_rows: int = 512


QUICK = Settings(width=96, layers=2, chain=2, steps=300, distil_steps=15, problems=100, calibration_rows=64)


def architecture(settings: Settings) -> dict[str, Any]:
    """The architecture as a config.json."""
    return {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": settings.width,
        "intermediate_size": settings.width * 8 // 3,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }


def fit(
    model: LanguageModel,
    settings: Settings,
    seed: int,
    label: str,
    *,
    steps: int,
    learning_rate: float,
    teacher: LanguageModel | None = None,
    stability: float = 0.0,
) -> LanguageModel:
    """Train a model on new problems: on the text, or to match a teacher's predictions and stability."""
    trained, frozen = split_params(model.params, "all" if teacher is None else "states")
    objective = Objective()
    if teacher is not None:
        objective = Objective(cross_entropy=0.0, divergence=1.0, stability=stability)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=learning_rate, warmup_steps=steps // 20, steps=steps, options={"b2": 0.98})
    )
    program = Program(model.decoder, objective, optimizer, None if teacher is None else teacher.decoder)
    batches = ProblemBatches(
        seed, rows=settings.rows, length=settings.length, steps=settings.chain, operands=settings.operands
    )
    constants = Constants(frozen, None if teacher is None else teacher.params)
    placed = Placed(program, trained, constants, make_mesh(1, devices=jax.devices()[:1]))
    with progress_bar(label) as bar:
        result = train(
            placed,
            batches,
            LoopConfig(steps),
            on_metrics=lambda m: bar(int(m["step"]), steps, f"{label}, loss {m['loss']:.3f}"),
        )
    if result.interrupted:
        raise KeyboardInterrupt
    return dataclasses.replace(model, params=merge_params(jax.tree.map(jnp.asarray, result.params), frozen))


def answered_right(model: LanguageModel, problems: Sequence[Problem]) -> list[bool]:
    """Whether the answer to each problem, decoded greedily with its working, is exactly right."""
    answers = generate(
        model,
        [np.asarray(encode(problem.prompt), np.int32) for problem in problems],
        max_new_tokens=max(len(problem.working) for problem in problems) + 4,
        stop_tokens=[END],
    )
    said = ["".join(ALPHABET[token] for token in answer) for answer in answers]
    return [text.endswith(f"#{problem.answer}\n") for text, problem in zip(said, problems, strict=True)]


def evaluate(model: LanguageModel, settings: Settings, seed: int) -> dict[str, float]:
    """Correct answers with greedy decoding, and perplexity of working and answers, on held-out problems."""
    rng = np.random.default_rng([seed, 10**6])
    problems = [make_problem(rng, settings.chain, settings.operands) for _ in range(settings.problems)]
    right = sum(answered_right(model, problems))
    tokens, weights = make_rows(rng, 64, settings.length, settings.chain, settings.operands)
    positions = np.broadcast_to(np.arange(settings.length, dtype=np.int32), tokens.shape)
    batch: Any = {"tokens": tokens, "positions": positions, "starts": np.zeros_like(tokens), "weights": weights}
    total, count, _ = jax.jit(lambda params: objective_sums(Objective(), model.decoder, params, batch))(model.params)
    return {"right": right, "problems": len(problems), "perplexity": math.exp(float(total) / float(count))}


def run_seed(settings: Settings, seed: int, directory: Path) -> list[dict[str, Any]]:
    """One dense model and all models made from it; finished results in files are not repeated."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    if not (directory / "dense" / "config.json").exists():
        fresh = fresh_model(architecture(settings), lambda: tokenizer, jax.random.key(seed), name="reasoner")
        trained = fit(fresh, settings, seed, "train", steps=settings.steps, learning_rate=settings.learning_rate)
        save_model(trained, directory / "dense")
    dense = load_model(str(directory / "dense"))
    rows = [_entry(directory, "dense", 1.0, lambda: _row(dense, settings, seed, "dense", 1.0, "as trained"))]
    rng = np.random.default_rng([seed, 10**6 + 1])
    rows_of = (settings.calibration_rows, settings.length, settings.chain, settings.operands)
    calibration = make_rows(rng, *rows_of)[0].ravel()
    for keep in KEEPS:
        for method in METHODS:

            def both(method: str = method, keep: float = keep) -> list[dict[str, Any]]:
                compact = convert(dense, Recipe(method, keep=keep), calibration, window=settings.length, batch_size=32)
                once = _row(compact, settings, seed, method, keep, "one-shot")
                label = f"{method} {keep:g}"
                distilled = fit(
                    compact, settings, seed + 1000, label,
                    steps=settings.distil_steps, learning_rate=settings.distil_rate, teacher=dense,
                )  # fmt: skip
                return once + _row(distilled, settings, seed, method, keep, "distilled")

            rows.append(_entry(directory, method, keep, both))
    return [row for entry in rows for row in entry]


def _entry(directory: Path, method: str, keep: float, make: Any) -> list[dict[str, Any]]:
    file = directory / f"{method}-{keep:g}.json"
    if not file.exists():
        write_json(file, {"rows": make()})
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        console.print(
            f"{row['method']} at {row['keep']:g}, {row['stage']}: {row['right']} of {row['problems']} right, "
            f"perplexity {row['perplexity']:.4f}, {row['stored']:,} parameters in the blocks"
        )
    return rows


def _row(
    model: LanguageModel, settings: Settings, seed: int, method: str, keep: float, stage: str
) -> list[dict[str, Any]]:
    blocks = sum(block.parameters for block in model.config.blocks())
    stored = blocks if model.plan is None else model.plan.count_parameters()
    where = {"method": method, "keep": keep, "stage": stage, "seed": seed, "stored": stored}
    return [{**where, **evaluate(model, settings, seed)}]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: accuracy with a 95 % interval (Wilson) over all problems, and perplexity from the mean logarithm."""
    kinds = dict.fromkeys((row["method"], row["keep"], row["stage"]) for row in rows)
    found = []
    for method, keep, stage in kinds:
        same = [row for row in rows if (row["method"], row["keep"], row["stage"]) == (method, keep, stage)]
        right, asked = sum(row["right"] for row in same), sum(row["problems"] for row in same)
        interval = binomtest(right, asked).proportion_ci(method="wilson")
        found.append(
            {
                "method": method,
                "keep": keep,
                "stage": stage,
                "seeds": len(same),
                "stored": round(sum(row["stored"] for row in same) / len(same)),
                "accuracy": right / asked,
                "low": interval.low,
                "high": interval.high,
                "by_seed": [row["right"] / row["problems"] for row in same],
                "perplexity": math.exp(sum(math.log(row["perplexity"]) for row in same) / len(same)),
            }
        )
    return found


def markdown(summary: list[dict[str, Any]]) -> str:
    """One table: methods by keep ratio, one-shot and distilled."""
    dense = next(row for row in summary if row["method"] == "dense")
    by_seed = ", ".join(f"{100 * accuracy:.1f} %" for accuracy in dense["by_seed"])
    lines = [
        f"Dense: {_percent(dense)} right ({by_seed} by seed), perplexity {dense['perplexity']:.4f}, "
        f"{dense['stored']:,} parameters in the blocks.",
        "",
        "| keep | method | stored | right, one-shot | right, distilled | perplexity, one-shot | distilled |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    cells = {(row["method"], row["keep"], row["stage"]): row for row in summary}
    for keep in KEEPS:
        for method in METHODS:
            once, distilled = cells[method, keep, "one-shot"], cells[method, keep, "distilled"]
            lines.append(
                f"| {keep:g} | `{method}` | {once['stored']:,} | {_percent(once)} | {_percent(distilled)} | "
                f"{once['perplexity']:.3f} | {distilled['perplexity']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def draw(summary: list[dict[str, Any]], file: Path) -> None:
    """Accuracy over stored parameters, one-shot beside distilled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    dense = next(row for row in summary if row["method"] == "dense")
    colours = {"ngc": "#c1121f", "ngc_paper": "#e9a23b", "svd_llm": "#1d3557", "basis_sharing": "#2a9d8f"}
    for axes, stage in zip(figure.subplots(1, 2, sharey=True), ("one-shot", "distilled"), strict=True):
        axes.axhline(100 * dense["accuracy"], color="#8d99ae", linestyle="--", linewidth=1)
        axes.annotate("dense", (0.02, 100 * dense["accuracy"] + 1), xycoords=("axes fraction", "data"), color="#6b7280")
        for method in METHODS:
            rows = sorted((r for r in summary if (r["method"], r["stage"]) == (method, stage)), key=lambda r: r["keep"])
            height = [100 * row["accuracy"] for row in rows]
            error = [
                [100 * (r["accuracy"] - r["low"]) for r in rows],
                [100 * (r["high"] - r["accuracy"]) for r in rows],
            ]
            axes.errorbar(
                [row["stored"] / dense["stored"] for row in rows], height, error, marker="o", capsize=2, label=method,
                color=colours.get(method, "#8d99ae"), linewidth=2 if method == "ngc" else 1.2,
            )  # fmt: skip
        axes.set_title(stage)
        axes.set_xlabel("stored parameters of the blocks / dense")
        axes.set_ylim(-2, 104)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("problems answered right, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reasoner"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        rows += run_seed(settings, seed, arguments.out / f"{'quick' if arguments.quick else 'full'}-seed-{seed}")
    summary = summarise(rows)
    write_json(
        arguments.out / "results.json", {"settings": dataclasses.asdict(settings), "rows": rows, "summary": summary}
    )
    (arguments.out / "results.md").write_text(markdown(summary), encoding="utf-8")
    draw(summary, arguments.out / "accuracy.png")
    console.print(markdown(summary))


if __name__ == "__main__":
    main()
