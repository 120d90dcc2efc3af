"""What an arena compares: its options, as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.commands.compare_entries import file_digest
from ngc_jax.commands.convert import CALIBRATION_TOKENS
from ngc_jax.conversion.methods import METHODS, Recipe
from ngc_jax.conversion.mixtures import sources_of
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.documents import read_documents
from ngc_jax.evaluation.specs import Document, GenerationSpec, MultipleChoiceSpec, PerplexitySpec
from ngc_jax.evaluation.tasks import read_task

DENSE = "dense"
FORM_DENSE = ", form dense"
COMPARED = ("svd_llm", "basis_sharing", "ngc_paper", "kfac_svd", "nystrom", "ngc", f"ngc{FORM_DENSE}")


def digest(*what: Any) -> str:
    """Ten letters that stand for plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(name: str) -> str:
    """A name as a part of a path."""
    return "".join(c if c.isalnum() or c in "+_-." else "_" for c in name).strip(".") or "_"


def text_digests(text: str | list[str]) -> list[Any]:
    """Names, shares and, of files, the content of a text or mixture."""
    sources = sources_of(text)
    if not sources:
        name = text if isinstance(text, str) else text[0]
        return [name, file_digest(name)]
    return [[source.name, source.share, file_digest(source.name)] for source in sources]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A task with its documents.

    Attributes:
        spec: The task.
        documents: The solved examples, then those that are scored.
        score: The score that tables show.
        least: The dense model's score from which on the task is given to converted ones.
    """

    spec: MultipleChoiceSpec | GenerationSpec
    documents: tuple[Document, ...]
    score: str
    least: float = 0.0

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    def key(self, batch_size: int) -> str:
        """Stands for everything that its responses depend on, but for the model."""
        return digest(self.spec.settings(), self.documents, batch_size)


def read_problem(
    given: str, *, limit: int | None, least: float, chat: bool = False, scores: Mapping[str, str] | None = None
) -> Problem:
    """A task from `NAME` or `NAME=FILE`.

    Args:
        given: The name of a task or a YAML file, and a source of documents in place of the task's own.
        limit: Number of scored documents; all if None.
        least: For generated answers, see `Problem`.
        chat: Put prompts into the chat template.
        scores: Shown score by task; by default acc_norm of given choices, and the last of generated answers.

    Raises:
        UsageError: If there is no such task or score, or its documents cannot be read.
    """
    name, _, source = given.partition("=")
    spec = read_task(name)
    if isinstance(spec, PerplexitySpec):
        raise UsageError(f"the task {spec.name} measures perplexity, of which no share is retained; leave it out")
    spec = dataclasses.replace(spec, chat=True) if chat else spec
    if not (source or spec.source):
        raise UsageError(f"the task {spec.name} names no documents; give them as {name}=FILE")
    documents = read_documents(source or str(spec.source))
    if limit is not None:
        documents = documents[: limit + spec.shots]
    score = (scores or {}).get(spec.name, spec.score_names[-1])
    if score not in spec.score_names:
        raise UsageError(f"the task {spec.name} has no score {score!r}; it has {', '.join(spec.score_names)}")
    return Problem(spec, tuple(documents), score, least if isinstance(spec, GenerationSpec) else 0.0)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Calibration and evaluation texts, and how many of their tokens are read.

    Attributes:
        calibration: Calibration text.
        evaluation: Texts of the perplexities.
        calibration_tokens: Tokens to measure; if None, 65,536 or all of a shorter text.
        gradient_tokens: Number of tokens, from the first, on which gradients are measured.
        propagation_tokens: Number of tokens, from the first, on which errors are propagated.
        max_tokens: Tokens of each evaluation text, after the calibration tokens if it is the calibration text.
        window: Tokens in a window; as for convert if None.
    """

    calibration: str | list[str]
    evaluation: tuple[str, ...]
    calibration_tokens: int | None = None
    gradient_tokens: int = 16_384
    propagation_tokens: int = 16_384
    max_tokens: int = 32_768
    window: int | None = None

    def skip(self, text: str) -> int:
        """Tokens at the start of an evaluation text that may have been read for calibration."""
        names = [source.name for source in sources_of(self.calibration)]
        read = text in names or self.calibration in (text, [text])
        return (self.calibration_tokens or CALIBRATION_TOKENS) if read else 0


@dataclasses.dataclass(frozen=True)
class Running:
    """How models are loaded and run.

    Attributes:
        batch_size: Prompts at once, and windows at once.
        dtype: Of the computation; None for float32 on CPU and bfloat16 elsewhere.
        param_dtype: Of the parameters; None for dtype.
        store_dtype: Of saved conversions; None for that of the parameters.
        keep_models: Keep the converted models.
        own_statistics: Every conversion measures for itself, which needs less memory and more time.
    """

    batch_size: int = 8
    dtype: str | None = None
    param_dtype: str | None = None
    store_dtype: str | None = None
    keep_models: bool = False
    own_statistics: bool = False


@dataclasses.dataclass(frozen=True)
class Arena:
    """All of it.

    Attributes:
        out: Directory of the results.
        methods: Names of methods; ", form dense" after one asks for that form.
        keeps: Keep ratios.
        problems: Tasks.
        texts: Texts.
        running: How models are run.
    """

    out: Path
    methods: Sequence[str]
    keeps: Sequence[float]
    problems: Sequence[Problem]
    texts: Texts
    running: Running

    def recipes(self) -> dict[tuple[str, float], Recipe]:
        """The conversions, by method and keep ratio; keep ratios of one method follow each other and share fits.

        Raises:
            UsageError: If there is no such method, or it has no such form.
        """
        found = {}
        for name in self.methods:
            method, form = name.removesuffix(FORM_DENSE), "dense" if name.endswith(FORM_DENSE) else None
            if method == DENSE or method not in METHODS:
                raise UsageError(f"there is no method {name!r} to compare; expected {', '.join(METHODS)}")
            for keep in self.keeps:
                found[name, keep] = Recipe(method, keep=keep, form=form)
        return found
