"""Prompts of a task: templates filled with the fields of documents, solved examples, chats, tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, Template, TemplateError, Undefined
from jinja2.environment import TemplateExpression
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.specs import Document, TaskSpec
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos

# Fields that a document lacks are errors: an empty prompt would be scored as if it were one.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@lru_cache
def _template(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


@lru_cache
def _expression(expression: str) -> TemplateExpression:
    return _ENVIRONMENT.compile_expression(expression, undefined_to_none=False)


def fill(template: str, document: Document, number: int) -> str:
    """A template with the fields of a document.

    Raises:
        UsageError: If it is not a template, or the document lacks a field.
    """
    try:
        return _template(template).render(document)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:  # filters raise what Python raises
        raise _unfilled(f"the template {template[:60]!r}", document, number, error) from None


def with_fields(spec: TaskSpec, documents: Sequence[Document]) -> list[Document]:
    """Documents with the fields that the task computes from theirs.

    Raises:
        UsageError: If an expression is none, or a document lacks a field.
    """
    return [{**document, **_computed(spec, document, number)} for number, document in enumerate(documents)]


def _computed(spec: TaskSpec, document: Document, number: int) -> dict[str, Any]:
    found = {}
    for name, expression in spec.fields.items():
        try:
            found[name] = _expression(expression)(document)
            if isinstance(found[name], Undefined):
                raise TemplateError("a field is undefined")
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise _unfilled(f"the field {name}, {expression[:60]!r},", document, number, error) from None
    return found


def _unfilled(what: str, document: Document, number: int, error: Exception) -> UsageError:
    fields = ", ".join(map(str, document))
    return UsageError(f"{what} cannot be filled from document {number} ({error}); it has {fields}")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of a task's documents.

    Attributes:
        spec: The task's description.
        tokenizer: The model's.
        bos: Start of a prompt, except in chats: their templates write their own.
        solved: Prompt and answer of each solved example.
    """

    spec: TaskSpec
    tokenizer: Tokenizer
    bos: Bos
    solved: tuple[tuple[str, str], ...]

    @property
    def delimiter(self) -> str:
        """Text between a prompt and a choice."""
        return "" if self.spec.chat else self.spec.delimiter

    def text(self, document: Document, number: int) -> str:
        """The prompt of a document: the solved examples, then its own.

        Raises:
            UsageError: If the document lacks a field, or the model has no chat template.
        """
        own = fill(self.spec.template, document, number)
        if not self.spec.chat:
            before = (f"{prompt}{self.spec.delimiter}{answer}\n\n" for prompt, answer in self.solved)
            return "".join(before) + own
        turns = [("system", self.spec.system)] if self.spec.system is not None else []
        for prompt, answer in self.solved:
            turns += [("user", prompt), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in [*turns, ("user", own)]]
        return self.tokenizer.render_chat(messages)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a prompt, with the start of a text by the tokenizer's rule.

        Raises:
            UsageError: If it has no tokens.
        """
        ids = self.tokenizer.encode_prompt(text, "never" if self.spec.chat else self.bos)
        if len(ids) == 0:
            raise UsageError("a prompt of the task has no tokens, and the tokenizer no BOS; give the template a text")
        return ids

    def split(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a context and of what follows it, as the whole text is tokenised.

        Spaces at the end of the context belong to the continuation's first token in most tokenizers, and are moved
        there. The split is after as many tokens as the context has alone (as in EleutherAI's evaluation harness).

        Raises:
            UsageError: If either has no tokens.
        """
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        before, whole = self.encode(context), self.encode(context + continuation)
        if len(whole) <= len(before):
            raise UsageError(f"the choice {continuation[:40]!r} has no tokens of its own; check the choices")
        return whole[: len(before)], whole[len(before) :]


def prepare_prompts(
    spec: TaskSpec,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    bos: Bos,
    answer: Callable[[Document, int], str],
) -> tuple[Prompts, list[tuple[int, Document]]]:
    """Prompts with solved examples, and the documents that are scored, with their numbers.

    Args:
        spec: The task's description.
        documents: With their computed fields; the first `spec.shots` are the examples.
        tokenizer: The model's.
        bos: Start of a prompt.
        answer: The answer of an example, from its document and number.

    Raises:
        UsageError: If the examples leave no document.
    """
    if len(documents) <= spec.shots:
        raise UsageError(f"{len(documents)} documents with {spec.shots} shots leave none to score; lower shots")
    solved = tuple(
        (fill(spec.template, document, number), answer(document, number))
        for number, document in enumerate(documents[: spec.shots])
    )
    return Prompts(spec, tokenizer, bos, solved), list(enumerate(documents))[spec.shots :]
