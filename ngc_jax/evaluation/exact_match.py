"""Generated answers compared with targets: whole texts, or numbers as in GSM8K."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.prompts import examples_before, fill, prompt_ids
from ngc_jax.evaluation.requests import GenerationRequest, Predict
from ngc_jax.evaluation.tasks import Document, Sum, TaskSpec
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos

# Digits with commas between thousands, a sign, a decimal part; a dollar sign may be before or after the sign.
_NUMBER = r"-?\$?-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def strict_number(text: str) -> Decimal | None:
    """The number after the first `####`, as GSM8K's answers have it; None if there is none.

    Example:
        >>> strict_number("5 apples cost $1,000.50. #### $1,000.50"), strict_number("1,000")
        (Decimal('1000.50'), None)
    """
    found = _STRICT.search(text)
    return None if found is None else _number(found[1])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none.

    Example:
        >>> last_number("First 3, then -4."), last_number("none")
        (Decimal('-4'), None)
    """
    found = _ANY.findall(text)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A generated answer is right if it equals the target.

    Attributes:
        spec: The task's description.
    """

    spec: TaskSpec

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    def prepare(self, documents: Sequence[Document], tokenizer: Tokenizer, bos: Bos) -> list[GenerationRequest]:
        """One request for each scored document.

        Raises:
            UsageError: If a document lacks a field.
        """
        spec = self.spec
        before, scored = examples_before(spec, documents, lambda document, number: fill(spec.target, document, number))
        found = []
        for number, document in scored:
            prompt = before + fill(spec.template, document, number)
            about = {"document": number, "target": fill(spec.target, document, number)}
            ids = prompt_ids(tokenizer, prompt, bos)
            found.append(GenerationRequest(str(number), ids, spec.max_new_tokens, spec.until, about))
        return found

    def measure(
        self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos
    ) -> dict[str, Sum]:
        """The score exact_match; or strict and flexible for numbers.

        Raises:
            UsageError: If the target of a task of numbers has no number.
        """
        requests = self.prepare(documents, tokenizer, bos)
        targets = [str(request.about["target"]) for request in requests]
        wanted = [last_number(target) for target in targets]
        for request, number in zip(requests, wanted, strict=True):
            if self.spec.answer == "number" and number is None:
                raise UsageError(f"the target of document {request.about['document']} has no number; use answer: text")
        responses = predict(requests)
        texts = [str(responses[request.id]["text"]) for request in requests]
        if self.spec.answer == "number":
            pairs = list(zip(texts, wanted, strict=True))
            return {
                "strict": Sum(tuple(float(strict_number(text) == number) for text, number in pairs)),
                "flexible": Sum(tuple(float(last_number(text) == number) for text, number in pairs)),
            }
        same = (text.strip() == target.strip() for text, target in zip(texts, targets, strict=True))
        return {"exact_match": Sum(tuple(map(float, same)))}
