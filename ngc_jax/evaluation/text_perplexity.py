"""Perplexity of documents as a task: responses are kept, and interrupted runs continue, as for other tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.perplexity import check_window, cut_windows, scored_bytes
from ngc_jax.evaluation.prompts import fill, with_fields
from ngc_jax.evaluation.requests import LikelihoodRequest, Predict
from ngc_jax.evaluation.scores import UnitPerplexity
from ngc_jax.evaluation.specs import Document, PerplexitySpec
from ngc_jax.evaluation.tasks import Measured
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos, begin_windows


@dataclasses.dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of documents, each scored by itself, by word, byte and token.

    Windows are those of `measure_perplexity`, and counts are of what is scored. Words are what white space separates.

    Attributes:
        spec: The task's description.
    """

    spec: PerplexitySpec

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    def prepare(
        self, documents: Sequence[Document], tokenizer: Tokenizer, bos: Bos
    ) -> list[tuple[np.ndarray, list[LikelihoodRequest]]]:
        """The stream of windows, and a request for each window, of every document.

        Raises:
            UsageError: If a document lacks a field, or has no token to score.
        """
        window, prefix, found = self.spec.window, tokenizer.prefix(bos), []
        check_window(window)
        for number, document in enumerate(with_fields(self.spec, documents)):
            tokens = tokenizer.encode(fill(self.spec.template, document, number))
            stream = begin_windows(tokens, window, prefix) if len(tokens) else tokens
            requests = [
                LikelihoodRequest(f"{number}/{index}", context, scored, {"document": number, "window": index})
                for index, (context, scored) in enumerate(cut_windows(stream, window, len(prefix)))
            ]
            if not requests:
                raise UsageError(f"document {number} has no token to score; leave it out")
            found.append((stream, requests))
        return found

    def measure(self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos) -> Measured:
        """The three perplexities."""
        prepared, prefix = self.prepare(documents, tokenizer, bos), len(tokenizer.prefix(bos))
        responses = predict([request for _, requests in prepared for request in requests])
        nats: list[float] = []
        units: dict[str, list[int]] = {name: [] for name in self.spec.score_names}
        for stream, requests in prepared:
            nats.append(-math.fsum(responses[request.id]["log_likelihood"] for request in requests))
            texts = [tokenizer.decode(request.continuation) for request in requests]
            units["word_perplexity"].append(max(sum(len(text.split()) for text in texts), 1))
            units["byte_perplexity"].append(scored_bytes(stream, self.spec.window, tokenizer, prefix))
            units["token_perplexity"].append(sum(len(request.continuation) for request in requests))
        scores = {name: UnitPerplexity(tuple(nats), tuple(counts)) for name, counts in units.items()}
        return Measured(tuple(range(len(prepared))), scores)
