"""Two runs on the same documents, compared document by document.

Two models answer the same questions, so their scores vary together; the difference is known better than the intervals
of the two scores suggest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.documents import document_key
from ngc_jax.evaluation.scores import Sum, UnitPerplexity, bootstrap_interval
from ngc_jax.evaluation.specs import Document
from ngc_jax.evaluation.tasks import Measured
from ngc_jax.files import parse_json, write_text

FILE = "scores.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """The scores of a finished run.

    Attributes:
        task: The task's name.
        documents: A hash of each scored document, in their order.
        scores: By name; values in the order of the documents.
    """

    task: str
    documents: tuple[str, ...]
    scores: Mapping[str, Sum]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A score in two runs on the same documents.

    Attributes:
        mean: In this run.
        other: In the other run.
        better: Number of documents with a higher score in this run.
        worse: Number of documents with a lower one.
        interval: 95 % confidence interval of the difference, this minus other: a bootstrap over documents, each with
            both of its scores.
        p_value: Of the exact McNemar test, two-sided: how probable a split into better and worse at least as unequal
            is if both are equally probable; None unless every document is right or wrong.
    """

    mean: float
    other: float
    better: int
    worse: int
    interval: tuple[float, float]
    p_value: float | None

    @property
    def difference(self) -> float:
        """This mean minus the other."""
        return self.mean - self.other

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "difference": self.difference, "interval": list(self.interval)}


def pair_scores(values: Sequence[float], other: Sequence[float]) -> Pair:
    """Compare the scores of the same documents in two runs.

    The test is McNemar's 1947 in its exact form: the documents that are right in one run only are a binomial sample.

    Args:
        values: (N,) this run's.
        other: (N,) the other run's, in the same order.

    Raises:
        ValueError: If there are none, or not the same number of both.

    Example:
        >>> pair = pair_scores([1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0])
        >>> pair.better, pair.worse, pair.difference, pair.p_value
        (5, 1, 0.5, 0.21875)
    """
    if len(values) != len(other) or not values:
        raise ValueError(f"there are {len(values)} scores and {len(other)}; expected the same number of both")
    differences = [float(one) - float(two) for one, two in zip(values, other, strict=True)]
    better, worse = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    p_value = None
    if {*map(float, values), *map(float, other)} <= {0.0, 1.0}:
        from scipy.stats import binomtest

        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    interval = bootstrap_interval(differences, (-1.0, 1.0))
    mean, before = (Sum(tuple(map(float, both))).mean for both in (values, other))
    return Pair(mean, before, better, worse, interval, p_value)


def compare_runs(run: Run | str | Path, other: Run | str | Path) -> dict[str, Pair]:
    """Compare two runs, score by score; scores that only one of them has are left out, and so are perplexities.

    Args:
        run: This one, or its directory.
        other: The other.

    Raises:
        UsageError: If a directory has no finished run, or the runs have other documents or no score in common.

    Example:
        >>> compare_runs("runs/gsm8k-0.8", "runs/gsm8k")["flexible"].interval  # doctest: +SKIP
        (-0.031, 0.012)
    """
    one, two = (each if isinstance(each, Run) else read_run(each) for each in (run, other))
    check_same_documents(one.documents, two.documents, str(other) if not isinstance(other, Run) else "the other run")
    common = [name for name, score in one.scores.items() if name in two.scores and type(score) is Sum]
    if not common:
        raise UsageError(
            f"the runs have no score in common: {', '.join(one.scores)} and {', '.join(two.scores)}; "
            "compare runs with the same kind of answer, which is not a perplexity, and the same samples"
        )
    return {name: pair_scores(one.scores[name].values, two.scores[name].values) for name in common}


def check_same_documents(keys: Sequence[str], other: Sequence[str], name: str) -> None:
    """Refuse to compare runs of different documents.

    Raises:
        UsageError: If the hashes differ.
    """
    if list(keys) != list(other):
        shared = len(set(keys) & set(other))
        raise UsageError(
            f"{name} scored {len(other)} documents and this run {len(keys)}, of which {shared} are the same; runs are "
            "compared on the same documents: give both the same data, limit and shots"
        )


def write_run(directory: Path, task: str, documents: Sequence[Document], measured: Measured) -> Run:
    """Write the scores of a finished run.

    Args:
        directory: The run's.
        task: The task's name.
        documents: All documents.
        measured: Which of them were scored, and how.
    """
    run = Run(task, tuple(document_key(documents[number]) for number in measured.numbers), measured.scores)
    scores = {name: list(score.values) for name, score in run.scores.items()}
    units = {name: list(score.units) for name, score in run.scores.items() if isinstance(score, UnitPerplexity)}
    data = {"task": task, "numbers": list(measured.numbers), "documents": list(run.documents), "scores": scores}
    data |= {"units": units} if units else {}
    write_text(directory / FILE, json.dumps(data) + "\n")
    return run


def read_run(directory: str | Path) -> Run:
    """Read the scores of a finished run.

    Raises:
        UsageError: If the directory has none.
    """
    file = Path(directory) / FILE
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
        units = data.get("units", {})
        scores = {
            str(name): UnitPerplexity(tuple(map(float, values)), tuple(map(int, units[name])))
            if name in units
            else Sum(tuple(map(float, values)))
            for name, values in data["scores"].items()
        }
        run = Run(str(data["task"]), tuple(map(str, data["documents"])), scores)
    except FileNotFoundError:
        raise UsageError(
            f"{directory} has no {FILE}; expected the --out of a finished evaluation of a task: run it to its end first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not a file of scores ({error!r}); evaluate that run again") from None
    if not run.documents or any(len(score.values) != len(run.documents) for score in scores.values()):
        raise UsageError(f"{file} has scores of other documents than it names; evaluate that run again")
    return run
