"""Multiple choice by log-likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.prompts import prepare_prompts, with_fields
from ngc_jax.evaluation.requests import LikelihoodRequest, Predict
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.specs import Document, MultipleChoiceSpec
from ngc_jax.evaluation.tasks import Measured
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """The choice of the greatest log-likelihood is the answer: as it is (acc), or per UTF-8 byte (acc_norm).

    Attributes:
        spec: The task's description.
    """

    spec: MultipleChoiceSpec

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    def prepare(
        self, documents: Sequence[Document], tokenizer: Tokenizer, bos: Bos
    ) -> list[tuple[int, list[LikelihoodRequest]]]:
        """The requests of each scored document: one for each choice; the choices share their context.

        Raises:
            UsageError: If a document lacks a field, or its choices or label are not such.
        """

        def right_choice(document: Document, number: int) -> str:
            choices, label = self._choices(document, number)
            return choices[label]

        documents = with_fields(self.spec, documents)
        prompts, scored = prepare_prompts(self.spec, documents, tokenizer, bos, right_choice)
        found = []
        for number, document in scored:
            text = prompts.text(document, number)
            requests = []
            for index, choice in enumerate(self._choices(document, number)[0]):
                context, continuation = prompts.split(text, prompts.delimiter + choice)
                about = {"document": number, "choice": index, "text": choice}
                requests.append(LikelihoodRequest(f"{number}/{index}", context, continuation, about))
            found.append((number, requests))
        return found

    def measure(self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos) -> Measured:
        """Both scores."""
        prepared = self.prepare(documents, tokenizer, bos)
        documents = with_fields(self.spec, documents)
        responses = predict([request for _, requests in prepared for request in requests])
        plain, normed = [], []
        for number, requests in prepared:
            choices, label = self._choices(documents[number], number)
            likelihoods = np.array([responses[request.id]["log_likelihood"] for request in requests])
            sizes = np.array([max(len(choice.encode()), 1) for choice in choices])
            plain.append(float(likelihoods.argmax() == label))
            normed.append(float((likelihoods / sizes).argmax() == label))
        scores = {"acc": Sum(tuple(plain)), "acc_norm": Sum(tuple(normed))}
        return Measured(tuple(number for number, _ in prepared), scores)

    def _choices(self, document: Document, number: int) -> tuple[list[str], int]:
        """The choices of a document and the index of the right one."""
        choices: Any = document.get(self.spec.choices)
        label, names = document.get(self.spec.label), None
        if isinstance(choices, dict):  # as in ARC and OpenBookQA
            choices, names = choices.get("text"), choices.get("label")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise UsageError(
                f"document {number} has {self.spec.choices} {str(choices)[:60]}; expected a list of two texts or more, "
                "or a mapping of text to such a list and of label to the names of its texts"
            )
        if isinstance(names, list) and label in names and len(names) == len(choices):
            return choices, names.index(label)
        if isinstance(label, str) and len(label) == 1 and label.isalpha():
            label = ord(label.upper()) - ord("A")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise UsageError(
                f"document {number} has {self.spec.label} {document.get(self.spec.label)!r}; expected the index of one "
                f"of its {len(choices)} choices, from 0, its letter, or its name"
            )
        return choices, label
