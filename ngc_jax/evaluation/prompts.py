"""Prompts of a task: templates filled with the fields of documents, solved examples, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.tasks import Document, TaskSpec
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos


@lru_cache
def _compile(template: str) -> Template:
    # Fields that a document lacks are errors: an empty prompt would be scored as if it were one.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)


def fill(template: str, document: Document, number: int) -> str:
    """A template with the fields of a document.

    Raises:
        UsageError: If it is not a template, or the document lacks a field.
    """
    try:
        return _compile(template).render(document)
    except TemplateError as error:
        fields = ", ".join(map(str, document))
        raise UsageError(
            f"the template {template[:60]!r} cannot be filled from document {number} ({error}); it has {fields}"
        ) from None


def examples_before(
    spec: TaskSpec, documents: Sequence[Document], answer: Callable[[Document, int], str]
) -> tuple[str, list[tuple[int, Document]]]:
    """The text of the solved examples, and the documents that are scored, with their numbers.

    Raises:
        UsageError: If the examples leave no document.
    """
    if len(documents) <= spec.shots:
        raise UsageError(f"{len(documents)} documents with {spec.shots} shots leave none to score; lower shots")
    solved = [
        fill(spec.template, document, number) + spec.delimiter + answer(document, number) + "\n\n"
        for number, document in enumerate(documents[: spec.shots])
    ]
    return "".join(solved), list(enumerate(documents))[spec.shots :]


def prompt_ids(tokenizer: Tokenizer, text: str, bos: Bos) -> np.ndarray:
    """Token ids of a prompt, with the start of a text by the tokenizer's rule."""
    ids = tokenizer.encode_prompt(text, bos)
    if len(ids) == 0:
        raise UsageError("a prompt of the task has no tokens, and the tokenizer no BOS; give the template a text")
    return ids


def split_ids(tokenizer: Tokenizer, context: str, continuation: str, bos: Bos) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a context and of what follows it, as the whole text is tokenised.

    Spaces at the end of the context belong to the continuation's first token in most tokenizers, and are moved there.
    The split is after as many tokens as the context has alone (as in EleutherAI's evaluation harness).

    Raises:
        UsageError: If either has no tokens.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    before, whole = prompt_ids(tokenizer, context, bos), prompt_ids(tokenizer, context + continuation, bos)
    if len(whole) <= len(before):
        raise UsageError(f"the choice {continuation[:40]!r} has no tokens of its own; check the choices")
    return whole[: len(before)], whole[len(before) :]
