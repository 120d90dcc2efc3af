"""Scores over documents: means with confidence intervals, and pass@k from several samples of a document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Resamples of a bootstrap: their 2.5 % and 97.5 % quantiles vary by about one hundredth of the interval's length.
_RESAMPLES = 9_999


@dataclasses.dataclass(frozen=True)
class Sum:
    """A score summed over documents.

    Attributes:
        values: The score of each document, from 0 to 1, in their order.
    """

    values: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum of the scores."""
        return math.fsum(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean.

        Wilson's if each document is right or wrong; otherwise, as for pass@k, a bootstrap over documents.
        """
        if set(self.values) <= {0.0, 1.0}:
            return wilson_interval(self.total, len(self.values))
        return bootstrap_interval(self.values, (0.0, 1.0))

    def show(self, value: float) -> str:
        """A value of the score, for readers."""
        return f"{100 * value:.1f} %"


@dataclasses.dataclass(frozen=True)
class UnitPerplexity(Sum):
    """exp of the mean negative log-likelihood of a unit of text, such as a word, over all documents together.

    Attributes:
        values: Negative log-likelihood of each document, in nats.
        units: Number of units of each document.

    Example:
        >>> score = UnitPerplexity((2.0, 4.0), (1, 2))
        >>> round(score.mean, 3), score.interval == (score.mean, score.mean)
        (7.389, True)
    """

    units: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The perplexity."""
        return _exp(self.total / sum(self.units))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval from the spread of the documents: the delta method for a ratio of sums."""
        count, mean = len(self.values), self.total / sum(self.units)
        if count < 2:
            return 1.0, math.inf
        rest = math.fsum((value - mean * units) ** 2 for value, units in zip(self.values, self.units, strict=True))
        half = 1.959964 * math.sqrt(rest * count / (count - 1)) / sum(self.units)
        return _exp(mean - half), _exp(mean + half)

    def show(self, value: float) -> str:
        """A value of the score, for readers."""
        return f"{value:,.3f}"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), 95 % by default.

    Example:
        >>> tuple(round(bound, 4) for bound in wilson_interval(81, 263))
        (0.2553, 0.3662)
    """
    if count < 1:
        raise ValueError("a proportion of nothing has no interval")
    p, scale = successes / count, 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(max(p * (1 - p), 0.0) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap_interval(values: Sequence[float], bounds: tuple[float, float]) -> tuple[float, float]:
    """95 % confidence interval of a mean: quantiles of the means of resampled documents (Efron 1979).

    Args:
        values: (N,) one number for each document.
        bounds: Least and greatest possible value; a single document says no more than them.

    Returns:
        The same bounds for the same values: the resampling has a fixed seed.

    Example:
        >>> low, high = bootstrap_interval([0.0, 0.25, 0.5, 1.0] * 25, (0.0, 1.0))
        >>> 0.35 < low < 0.4375 < high < 0.52
        True
    """
    if len(values) < 2:
        return bounds
    from scipy.stats import bootstrap

    batch = max(1, 2**22 // len(values))  # resamples in memory at once
    sample = (np.asarray(values, np.float64),)
    found = bootstrap(sample, np.mean, n_resamples=_RESAMPLES, batch=batch, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers is right, estimated without bias from n samples of which c are right.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, arXiv 2107.03374, equation 1.

    Args:
        samples: n.
        correct: c.
        k: At most n.

    Example:
        >>> pass_at_k(4, 2, 1), pass_at_k(4, 2, 2), pass_at_k(4, 2, 3)
        (0.5, 0.8333333333333334, 1.0)
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {correct} right answers among {samples} is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
