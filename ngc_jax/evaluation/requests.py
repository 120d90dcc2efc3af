"""What a task asks of a model, and what it gets: plain data, without tasks and without models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LikelihoodRequest:
    """How likely is a continuation?

    Attributes:
        id: Unique in the task.
        context: (L,) token ids, at least one.
        continuation: (T,) token ids, at least one.
        about: What is kept with the response, for readers.
    """

    id: str
    context: np.ndarray
    continuation: np.ndarray
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """How does a text continue, greedily?

    Attributes:
        id: Unique in the task.
        prompt: (L,) token ids, at least one.
        max_new_tokens: Longest continuation.
        until: Texts before which the answer ends.
        about: What is kept with the response, for readers.
    """

    id: str
    prompt: np.ndarray
    max_new_tokens: int
    until: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Request = LikelihoodRequest | GenerationRequest
# {"log_likelihood": nats, "tokens": scored} or {"text": answer, "tokens": generated}.
Response = Mapping[str, Any]
# From requests, all of one kind, to a response for each id.
Predict = Callable[[Sequence[Request]], Mapping[str, Response]]
