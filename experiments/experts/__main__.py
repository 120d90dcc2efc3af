"""Experts that share a latent space against experts of their own, at equal stored parameters.

    python -m experiments.experts --out runs/experts

Trains a small language model of bytes with mixtures of experts on one half of Python's documentation, converts it at
several keep ratios, and measures the perplexity per byte of the other half. All rows but `ngc` and `svd_llm` differ in
the topology of u and g alone: ranks by one price for all groups, the fixed gauge, all hidden neurons kept. Rows that
are in --out are not repeated. With --priors it also varies how far an expert's statistics are shrunk towards its
layer's average, on a short calibration text.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.experts.training import HF_CONFIG, load_or_train
from ngc_jax.conversion import Chain, chain, convert, factorise
from ngc_jax.conversion import experts as statistics_of_experts
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.measure import measure
from ngc_jax.conversion.state import Calibration, Needs
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.evaluation.likelihood import token_log_likelihoods
from ngc_jax.files import write_json
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel
from ngc_jax.reporting.charts import Lines, Series
from ngc_jax.reporting.render.plots import draw as draw_chart
from ngc_jax.text import read_text, split_windows

TOPOLOGIES = {
    "private": "q-k-v-o-u-g-d",
    "private, u with g": "q-k-v-o-ug-d",
    "shared u, shared g": "q-k-v-o-u*-g*-d",
    "shared u with g": "q-k-v-o-ug*-d",
    "chosen by loss": "q-k-v-o-u?-g?-d",
}
KEEPS = (0.8, 0.6, 0.4, 0.2)
PRIORS = (0.0, 1 / 32, 1 / 8, 1 / 2, 2.0)


class Held:
    """Statistics that are measured once, for conversions that prune nothing."""

    def __init__(self, model: LanguageModel, calibration: Calibration, fits: FitCache) -> None:
        """Measure everything."""
        self.fits = fits
        needs = Needs(inputs=True, gradients="full", held=True)
        self._layers = list(measure(model, needs, calibration))

    def stream(self, needs: Needs) -> Iterator[dict[str, Statistics]]:
        """The layers."""
        yield from (dict(layer) for layer in self._layers)


def rows(names: list[str], keeps: list[float]) -> Iterator[tuple[str, float, Chain | str]]:
    """Name, keep ratio, and passes or method of every conversion; those with a common fit follow each other."""
    for name in names:
        for keep in keeps:
            if name in TOPOLOGIES:
                one = factorise("ngc", topology=TOPOLOGIES[name], allocation="loss", gauge=True, shrinkage=0.03)
                yield name, keep, chain(one)
            else:
                yield name, keep, name


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rows that are not in the file yet; returns everything."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": [], "priors": []}
    train, held_out = (as_bytes(read_text(f"pydoc:{half}-half")) for half in ("first", "second"))
    model, used = load_or_train(train, out, args.steps, args.seed)
    tokens = held_out[: args.evaluation_tokens]

    def perplexity(one: LanguageModel) -> float:
        return perplexity_per_byte(one, tokens)

    if "dense" not in done:
        done |= {"dense": perplexity(model), "parameters": model.count_parameters(), "routing": used}
        write_json(file, done)
    print(f"dense: {done['dense']:.3f}, {done['parameters']:,} parameters", flush=True)
    calibration = Calibration(train[: args.calibration_tokens], window=256, gradient_tokens=args.calibration_tokens)
    held = None
    with FitCache() as fits:
        for name, keep, how in rows(args.rows, args.keeps):
            if any((row["name"], row["keep"]) == (name, keep) for row in done["rows"]):
                continue
            if name in TOPOLOGIES and held is None:
                held = Held(model, calibration, fits)
            measurements = held if name in TOPOLOGIES else None
            compact = convert(model, how, calibration, keep=keep, measurements=measurements)
            done["rows"].append({"name": name, "keep": keep, **summary(compact), "perplexity": perplexity(compact)})
            write_json(file, done)
            print(json.dumps(done["rows"][-1]), flush=True)
    short = Calibration(train[: args.short_tokens], window=256, gradient_tokens=args.short_tokens)
    for prior in PRIORS if args.priors else ():
        if any(row["prior"] == prior for row in done["priors"]):
            continue
        statistics_of_experts.PRIOR_TOKENS = prior
        found = {}
        for name in ("private", "shared u, shared g"):
            ((_, _, how),) = rows([name], [0.6])
            found[name] = perplexity(convert(model, how, short, keep=0.6))
        done["priors"].append({"prior": prior, "tokens": args.short_tokens, **found})
        write_json(file, done)
        print(json.dumps(done["priors"][-1]), flush=True)
    (out / "table.md").write_text(table(done) + "\n")
    draw(done, out / "experts.png")
    return done


def summary(compact: LanguageModel) -> dict[str, Any]:
    """The kept share, and what the planner chose for u and g."""
    assert compact.plan is not None
    names = [group.name for group in compact.plan.groups]
    ranks = {kind: [g.rank for g in compact.plan.groups if kind in g.name] for kind in ("u", "g", "d")}
    means = {f"rank of {kind}": round(float(np.mean(found)), 1) for kind, found in ranks.items() if found}
    return {"kept": compact.plan.keep_ratio(), "shared groups": sum(name.endswith("*") for name in names), **means}


def perplexity_per_byte(model: LanguageModel, tokens: np.ndarray) -> float:
    """Of windows of 256 bytes, the first of each unscored; in the run-time layout."""
    model, total, count = inference_model(model), 0.0, 0.0
    score = jax.jit(partial(token_log_likelihoods, model.decoder))
    for batch, positions in split_windows(tokens, 256, 8):
        likelihoods, mask = score(model.params, batch, positions)
        total, count = total + float((likelihoods * mask).sum()), count + float(mask.sum())
    return math.exp(-total / count)


def as_bytes(text: str) -> np.ndarray:
    """A text's bytes as token ids."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def table(done: Mapping[str, Any]) -> str:
    """Perplexity by row and keep ratio, in Markdown."""
    keeps = sorted({row["keep"] for row in done["rows"]}, reverse=True)
    found = {(row["name"], row["keep"]): row["perplexity"] for row in done["rows"]}
    lines = ["| u and g | " + " | ".join(f"{keep:g}" for keep in keeps) + " |", "|---|" + "---|" * len(keeps)]
    for name in dict.fromkeys(row["name"] for row in done["rows"]):
        cells = [f"{found[name, keep]:.3f}" if (name, keep) in found else "" for keep in keeps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(done: Mapping[str, Any], file: Path) -> None:
    """Perplexity over the kept share, a line for each row."""
    names = list(dict.fromkeys(row["name"] for row in done["rows"]))
    found = {name: [row for row in done["rows"] if row["name"] == name] for name in names}
    series = tuple(
        Series(
            name,
            tuple(row["kept"] for row in some),
            tuple(row["perplexity"] for row in some),
            style=number,
            markers=True,
        )
        for number, (name, some) in enumerate(found.items())
    )
    chart = Lines(
        "Experts with latent spaces of their own, and shared ones",
        "Lower is better.",
        "stored over dense parameters",
        "perplexity per byte",
        series,
        y_scale="log",
        rules=((done["dense"], "dense"),),
    )
    draw_chart(chart).savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/experts", help="where the model, results.json and the picture are")
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and of the batches")
    parser.add_argument("--rows", nargs="+", default=[*TOPOLOGIES, "ngc", "svd_llm"], help="what to convert by")
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS), help="keep ratios")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="from the training text")
    parser.add_argument("--evaluation-tokens", type=int, default=65_536, help="from the held-out text")
    parser.add_argument("--priors", action="store_true", help="also vary the shrinkage of experts' statistics")
    parser.add_argument("--short-tokens", type=int, default=4096, help="calibration tokens with --priors")
    args = parser.parse_args()
    print(f"{HF_CONFIG['num_hidden_layers']} layers, {HF_CONFIG['num_experts']} experts", flush=True)
    print(table(run(args)))


if __name__ == "__main__":
    main()
