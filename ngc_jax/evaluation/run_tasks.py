"""Run a task with a model: every response is kept, and a run that was interrupted continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.exact_match import ExactMatch
from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.pairs import FILE as SCORES
from ngc_jax.evaluation.pairs import Run, write_run
from ngc_jax.evaluation.predict import plan_batches
from ngc_jax.evaluation.requests import Request, Response
from ngc_jax.evaluation.responses import Responses
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.specs import Document, MultipleChoiceSpec, PerplexitySpec, Spec
from ngc_jax.evaluation.tasks import Task
from ngc_jax.evaluation.text_perplexity import TextPerplexity
from ngc_jax.files import lock_directory
from ngc_jax.models.load import LanguageModel
from ngc_jax.tokens import Bos
from ngc_jax.types import Progress


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Scores of a model on a task.

    Attributes:
        run: The task's name, the scored documents, and their scores.
        reused: Responses that an earlier run had made.
        cut: Prompts that were too long for the model and lost their first tokens.
        truncated: For generated answers, the share that reached the longest answer before their end.
        tokens: For generated answers, their mean number of tokens, the one that ends them included.
    """

    run: Run
    reused: int
    cut: int
    truncated: Sum | None = None
    tokens: float | None = None

    @property
    def documents(self) -> int:
        """Number of scored documents."""
        return len(self.run.documents)

    @property
    def scores(self) -> Mapping[str, Sum]:
        """Scores by name."""
        return self.run.scores

    def summary(self) -> dict[str, Any]:
        """Plain data: mean and 95 % interval of each score."""
        found = {
            "task": self.run.task,
            "documents": self.documents,
            "scores": {name: _summary(score) for name, score in self.scores.items()},
            "reused": self.reused,
            "cut": self.cut,
        }
        if self.truncated is not None:
            found |= {"truncated": _summary(self.truncated), "tokens": self.tokens}
        return found


def _summary(score: Sum) -> dict[str, Any]:
    return {"mean": score.mean, "total": score.total, "interval": list(score.interval)}


def task_of(spec: Spec) -> Task:
    """The task that a description describes."""
    if isinstance(spec, PerplexitySpec):
        return TextPerplexity(spec)
    return MultipleChoice(spec) if isinstance(spec, MultipleChoiceSpec) else ExactMatch(spec)


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
    spec: Spec,
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
        directory: For `responses.jsonl`, and at the end `scores.json`, from which runs are compared.
        settings: What else tells this run from another, such as the model's fingerprint.
        how: Batch size, BOS, and whether earlier responses are discarded.
        progress: Called with (stage, requests done, total).

    Raises:
        UsageError: If documents do not fit the task, or the directory holds responses of another run.

    Example:
        >>> documents = [{"question": "2 + 2", "sum": "4"}, {"question": "1 + 4", "sum": "5"}]
        >>> from ngc_jax.evaluation.specs import GenerationSpec
        >>> spec = GenerationSpec("sums", "{{ question }} =", target="{{ sum }}", max_new_tokens=2)
        >>> run_task(model, spec, documents, "runs/sums").documents  # doctest: +SKIP
        2
    """
    how = how or RunOptions()
    tokenizer = model.load_tokenizer()
    all_settings = {
        "task": spec.settings(),
        "documents": _hash(documents),
        "batch_size": how.batch_size,
        "bos": how.bos,
        **(settings or {}),
    }
    reused = cut = 0
    with lock_directory(directory) as place, Responses(place, all_settings, overwrite=how.overwrite) as kept:
        (place / SCORES).unlink(missing_ok=True)

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

        measured = task_of(spec).measure(documents, tokenizer, predict, how.bos)
        run = write_run(place, spec.name, documents, measured)
    tokens = math.fsum(measured.tokens) / len(measured.tokens) if measured.tokens else None
    return TaskResult(run, reused, cut, measured.truncated, tokens)


def _hash(documents: Sequence[Document]) -> str:
    text = json.dumps(documents, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
