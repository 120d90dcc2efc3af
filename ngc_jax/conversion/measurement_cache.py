"""Statistics that are measured once and kept on disk, for many conversions of one model on one text."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax.conversion.fisher import measure_fisher
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.pruning import PRUNED_ROLES
from ngc_jax.conversion.state import Calibration, Needs
from ngc_jax.conversion.statistics import Statistics, measure_inputs
from ngc_jax.conversion.statistics_file import load_statistics, save_statistics
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.types import Params, Progress


class MeasurementCache:
    """The statistics that many conversions need, measured once; `convert` takes it as `measurements`.

    Attributes:
        fits: Fits that conversions share.
        seconds: Time of the measurements by kind: inputs, gradients, fisher.
    """

    def __init__(
        self,
        directory: str | Path,
        model: LanguageModel,
        calibration: Calibration,
        needs: Needs,
        fits: FitCache,
        progress: Progress | None = None,
    ) -> None:
        """Read the statistics in the directory; if some of those needed are missing, measure and write them.

        Args:
            directory: Of the statistics of this model on this text; `drop` removes it.
            model: The dense model.
            calibration: The text.
            needs: The needs of all conversions together.
            fits: For fits that conversions share.
            progress: Called with (stage, done, total).
        """
        self.fits = fits
        self._directory, self._params = Path(directory), model.params
        kinds = _kinds(needs)
        found = load_statistics(self._directory)
        if found is None or not set(kinds) <= set(found[1]["kinds"]):
            self._layers, self.seconds = _measure(model, calibration, needs, progress)
            save_statistics(self._layers, self._directory, {"kinds": kinds, "seconds": self.seconds})
        else:
            self._layers, self.seconds = found[0], found[1]["seconds"]

    def stream(self, needs: Needs) -> Iterator[dict[str, Statistics]]:
        """The statistics of each layer, as `measure` would return them for these needs."""
        for layer in self._layers if needs.anything else ():
            yield restrict(layer, needs, self._params)

    def seconds_for(self, needs: Needs) -> float:
        """Time that these measurements took, in seconds."""
        wanted = {"inputs": needs.anything, "gradients": needs.gradients is not None, "fisher": needs.fisher}
        return sum(self.seconds[kind] for kind, is_wanted in wanted.items() if is_wanted)

    def drop(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)


def restrict(layer: Mapping[str, Statistics], needs: Needs, params: Params) -> dict[str, Statistics]:
    """The statistics of a layer as if no more than `needs` had been measured.

    Args:
        layer: By block name, with G itself where `needs.whole`.
        needs: What is needed; unless `whole`, W^T G W replaces G where it is smaller.
        params: The dense model's.
    """

    def one(name: str, statistics: Statistics) -> Statistics:
        gradients = statistics.gradients if needs.gradients is not None else None
        if gradients is not None and gradients.second_moment is not None and not needs.whole:
            weight = np.asarray(kernel_of(params, name), np.float64)
            if len(gradients.second_moment) == len(weight) > weight.shape[1]:
                pulled = weight.T @ gradients.second_moment @ weight
                gradients = dataclasses.replace(gradients, second_moment=pulled)
        if gradients is not None and needs.gradients == "diagonal":
            gradients = dataclasses.replace(gradients, second_moment=None)
        return dataclasses.replace(statistics, gradients=gradients, fisher=statistics.fisher if needs.fisher else None)

    return {name: one(name, statistics) for name, statistics in layer.items()}


def _kinds(needs: Needs) -> list[str]:
    named = {
        "inputs": needs.anything,
        "gradients": needs.gradients is not None,
        "fisher": needs.fisher,
        "whole": needs.whole and needs.gradients is not None,
    }
    return [kind for kind, is_needed in named.items() if is_needed]


def _measure(
    model: LanguageModel, calibration: Calibration, needs: Needs, progress: Progress | None
) -> tuple[list[dict[str, Statistics]], dict[str, float]]:
    """All layers' statistics, and the seconds that each kind took."""
    report = progress or (lambda stage, done, total: None)
    if not needs.anything:
        return [], {"inputs": 0.0}
    seconds: dict[str, float] = {}
    fisher: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    # Whatever the conversions' own sizes of batches, so that the cache serves them all.
    text = Calibration(calibration.tokens, calibration.window)
    some = Calibration(text.tokens[: calibration.gradient_tokens], text.window, batch_size=2)
    started = time.perf_counter()
    stream = measure_inputs(model, text, progress=lambda *a: report("calibrate", *a))
    layers = [statistics for _, statistics in stream]
    seconds["inputs"] = time.perf_counter() - started
    if needs.gradients is not None:
        started = time.perf_counter()
        gradients, _ = measure_output_gradients(
            model,
            some,
            GradientMeasurement(full_roles=PRUNED_ROLES if needs.whole else ""),
            progress=lambda *a: report("gradients", *a),
        )
        seconds["gradients"] = time.perf_counter() - started
    if needs.fisher:
        started = time.perf_counter()
        fisher = measure_fisher(model, some.tokens, window=some.window, progress=lambda *a: report("fisher", *a))
        seconds["fisher"] = time.perf_counter() - started
    return [
        {n: dataclasses.replace(s, fisher=fisher.get(n), gradients=gradients.get(n)) for n, s in layer.items()}
        for layer in layers
    ], seconds
