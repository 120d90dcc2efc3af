"""How much of a dense model's score above chance a converted one keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.specs import Document, GenerationSpec, MultipleChoiceSpec
from ngc_jax.models.tokenizer import Tokenizer

# Resamples of a bootstrap, and how many numbers of them are in memory at once.
_RESAMPLES, _NUMBERS = 9_999, 2**22


@dataclasses.dataclass(frozen=True)
class Scores:
    """The score of a model and of the dense one on the same documents of a task.

    Attributes:
        values: (N,) the model's.
        dense: (N,) the dense model's, in the same order.
        chance: (N,) the expected score of a random answer.
    """

    values: tuple[float, ...]
    dense: tuple[float, ...]
    chance: tuple[float, ...]

    @property
    def comparable(self) -> bool:
        """Whether the 95 % interval of the dense model's score is above chance; if not, no share is defined."""
        return Sum(self.dense).interval[0] > Sum(self.chance).mean


@dataclasses.dataclass(frozen=True)
class Retained:
    """A share with its 95 % confidence interval.

    Attributes:
        share: (score - chance) / (dense score - chance): 1 for no loss, 0 for a random answer.
        interval: Quantiles of a bootstrap over documents, each with both of its scores.
    """

    share: float
    interval: tuple[float, float]


def chance_of(
    spec: MultipleChoiceSpec | GenerationSpec, documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[float, ...]:
    """The expected score of a random answer to each scored document: 1 / choices, and 0 for generated answers.

    Args:
        spec: The task.
        documents: All documents; the first `spec.shots` are examples.
        tokenizer: The model's.
    """
    if isinstance(spec, GenerationSpec):
        return (0.0,) * (len(documents) - spec.shots)
    return tuple(1 / len(requests) for _, requests in MultipleChoice(spec).prepare(documents, tokenizer, "auto"))


def retained(tasks: Sequence[Scores]) -> Retained | None:
    """The retained share of a model, averaged over tasks; None without a task on which the dense model knows something.

    Args:
        tasks: Its scores on each; those that are not comparable are left out.

    Returns:
        The same interval for the same scores: the resampling has a fixed seed. Tasks are resampled independently.

    Example:
        >>> found = retained([Scores((1, 1, 0, 0, 1, 0) * 20, (1, 1, 1, 0, 1, 0) * 20, (0.25,) * 120)])
        >>> round(found.share, 3), found.interval[0] < found.share < found.interval[1] < 1
        (0.6, True)
    """
    tasks = [task for task in tasks if task.comparable]
    if not tasks:
        return None
    generator = np.random.default_rng(0)
    share, resampled = np.zeros(()), np.zeros(_RESAMPLES)
    for task in tasks:
        above = np.array([task.values, task.dense], np.float64) - np.asarray(task.chance, np.float64)
        share = share + _share(*above.sum(1)) / len(tasks)
        resampled += _share(*_resample(above, generator)) / len(tasks)
    low, high = np.quantile(resampled, (0.025, 0.975), method="inverted_cdf")
    return Retained(float(share), (float(low), float(high)))


def _share(model: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Their ratio; infinite where the dense model of a resample is not above chance."""
    positive = dense > 0
    return np.where(positive, model / np.where(positive, dense, 1.0), np.inf)


def _resample(above: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(2, resamples) sums of (2, N) numbers over N documents drawn with replacement, the same for both rows."""
    count = above.shape[1]
    step, parts, left = max(1, _NUMBERS // count), [], _RESAMPLES
    while left:
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(step, left))
        parts.append(above @ times.T)
        left -= len(times)
    return np.concatenate(parts, axis=1)
