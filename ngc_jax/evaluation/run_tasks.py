"""Run a task with a model: every response is kept, and a run that was interrupted continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.exact_match import ExactMatch
from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.predict import plan_batches
from ngc_jax.evaluation.requests import Request, Response
from ngc_jax.evaluation.responses import Responses
from ngc_jax.evaluation.tasks import Document, Sum, Task, TaskSpec
from ngc_jax.files import lock_directory
from ngc_jax.models.load import LanguageModel
from ngc_jax.tokens import Bos
from ngc_jax.types import Progress


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Scores of a model on a task.

    Attributes:
        task: The task's name.
        documents: Number of scored documents.
        scores: By name.
        reused: Responses that an earlier run had made.
        cut: Prompts that were too long for the model and lost their first tokens.
    """

    task: str
    documents: int
    scores: Mapping[str, Sum]
    reused: int
    cut: int

    def summary(self) -> dict[str, Any]:
        """Plain data: mean and 95 % Wilson interval of each score."""
        scores = {
            name: {"mean": score.mean, "total": score.total, "interval": list(score.interval)}
            for name, score in self.scores.items()
        }
        return {
            "task": self.task,
            "documents": self.documents,
            "scores": scores,
            "reused": self.reused,
            "cut": self.cut,
        }


def task_of(spec: TaskSpec) -> Task:
    """The task that a description describes."""
    return MultipleChoice(spec) if spec.metric == "multiple_choice" else ExactMatch(spec)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a task is run.

    Attributes:
        batch_size: Prompts at once.
        bos: Start of a prompt; see `Tokenizer.prefix`.
        overwrite: Discard responses that the directory holds.

    Raises:
        UsageError: If the batch size is below 1.
    """

    batch_size: int = 8
    bos: Bos = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch size is {self.batch_size}; expected at least 1")


def run_task(
    model: LanguageModel,
    spec: TaskSpec,
    documents: Sequence[Document],
    directory: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    how: RunOptions | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Evaluate a model on a task.

    The same call again, with the same directory, answers only what is not answered yet. Its batches are the same as
    those of an undisturbed run, and so are its results.

    Args:
        model: Dense or compact.
        spec: The task.
        documents: All documents; the first `spec.shots` are examples.
        directory: For `responses.jsonl`.
        settings: What else tells this run from another, such as the model's fingerprint.
        how: Batch size, BOS, and whether earlier responses are discarded.
        progress: Called with (stage, requests done, total).

    Raises:
        UsageError: If documents do not fit the task, or the directory holds responses of another run.

    Example:
        >>> documents = [{"question": "2 + 2", "sum": "4"}, {"question": "1 + 4", "sum": "5"}]
        >>> spec = TaskSpec("sums", "{{ question }} =", "exact_match", target="{{ sum }}", max_new_tokens=2)
        >>> run_task(model, spec, documents, "runs/sums").documents  # doctest: +SKIP
        2
    """
    how = how or RunOptions()
    tokenizer = model.load_tokenizer()
    all_settings = {
        "task": dataclasses.asdict(dataclasses.replace(spec, source=None)),
        "documents": hashlib.blake2b(json.dumps(documents, sort_keys=True).encode(), digest_size=16).hexdigest(),
        "batch_size": how.batch_size,
        "bos": how.bos,
        **(settings or {}),
    }
    reused = cut = 0
    with lock_directory(directory) as place, Responses(place, all_settings, overwrite=how.overwrite) as kept:

        def predict(requests: Sequence[Request]) -> Mapping[str, Response]:
            nonlocal reused, cut
            batches = plan_batches(model, tokenizer, requests, how.batch_size)
            reused = sum(request.id in kept.found for request in requests)
            done = 0
            for batch in batches:
                if not all(request.id in kept.found for request in batch.requests):
                    kept.add(batch.requests, batch.answer())
                done += len(batch.requests)
                if progress is not None:
                    progress("evaluate", done, len(requests))
            cut = sum("cut" in kept.found[request.id] for request in requests)
            return kept.found

        scores = task_of(spec).measure(documents, tokenizer, predict, how.bos)
    return TaskResult(spec.name, len(next(iter(scores.values())).values), scores, reused, cut)
