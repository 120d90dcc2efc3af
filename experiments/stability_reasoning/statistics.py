"""Tests of differences with effect sizes and intervals, and their correction for multiple testing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9999
LEAST = 8  # values in a sample; fewer give no result, since a resample could consist of one value


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two samples: of the second over the first.

    Attributes:
        pairs: Whether the samples are matched.
        n: Size of each sample; equal for pairs.
        mean: Difference of the means.
        low: Lower end of its 95 % bootstrap interval (BCa, Efron 1987).
        high: Upper end.
        effect: Cohen's d_z of pairs (mean difference over its standard deviation); else the rank-biserial correlation,
            P(second > first) - P(second < first) (Cureton 1956).
        effect_low: Lower end of the effect's 95 % bootstrap interval (percentiles).
        effect_high: Upper end.
        p: Two-sided: of Wilcoxon's signed-rank test for pairs, else of Mann and Whitney's.
    """

    pairs: bool
    n: tuple[int, int]
    mean: float
    low: float
    high: float
    effect: float
    effect_low: float
    effect_high: float
    p: float


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference | None:
    """The difference second - first of matched samples; None if there are too few.

    Args:
        first: (n,).
        second: (n,) in the same order.
        seed: Of the bootstrap.
    """
    change = np.asarray(second, float) - np.asarray(first, float)
    n = len(change)
    if n < LEAST:
        return None
    if not np.any(change):
        return Difference(True, (n, n), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    low, high = _interval((change,), _mean, seed, "BCa")
    effect_low, effect_high = _interval((change,), d_z, seed, "percentile")
    p = float(stats.wilcoxon(change).pvalue)
    return Difference(True, (n, n), float(change.mean()), low, high, float(d_z(change)), effect_low, effect_high, p)


def unpaired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference | None:
    """The difference second - first of independent samples; None if one of them is too small.

    Args:
        first: (n,).
        second: (m,).
        seed: Of the bootstrap.
    """
    samples = (np.asarray(first, float), np.asarray(second, float))
    n, m = map(len, samples)
    if min(n, m) < LEAST:
        return None

    def mean(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return _mean(b, axis) - _mean(a, axis)

    low, high = _interval(samples, mean, seed, "BCa")
    effect_low, effect_high = _interval(samples, rank_biserial, seed, "percentile")
    p = float(stats.mannwhitneyu(*samples).pvalue)
    return Difference(
        False, (n, m), float(mean(*samples)), low, high, float(rank_biserial(*samples)), effect_low, effect_high, p
    )


def d_z(change: np.ndarray, axis: int = -1) -> Any:
    """Cohen's d_z: the mean of paired differences over their standard deviation."""
    return _mean(change, axis) / np.std(change, axis=axis, ddof=1)


def rank_biserial(first: np.ndarray, second: np.ndarray, axis: int = -1) -> Any:
    """P(second > first) - P(second < first), ties counting for neither."""
    first, second = np.moveaxis(first, axis, -1), np.moveaxis(second, axis, -1)
    return np.mean(np.sign(second[..., None, :] - first[..., :, None]), axis=(-2, -1))


def residuals(values: Sequence[float], covariate: Sequence[float]) -> np.ndarray:
    """Values without their linear dependence on the covariate; their mean does not change."""
    y, x = np.asarray(values, float), np.asarray(covariate, float)
    if np.ptp(x) == 0:
        return y
    slope = stats.linregress(x, y).slope
    return y - slope * (x - x.mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests (Holm 1979, Scand. J. Statist. 6:65), valid at any significance level.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none is below its predecessor.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted.tolist()


def _mean(values: np.ndarray, axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _interval(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int, method: str
) -> tuple[float, float]:
    """The 95 % bootstrap interval; the value itself if there is no variation."""
    if all(np.ptp(sample) == 0 for sample in samples):
        value = float(statistic(*samples))
        return value, value
    found = stats.bootstrap(
        samples,
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
