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
    """How does a text continue?

    Attributes:
        id: Unique in the task.
        prompt: (L,) token ids, at least one.
        max_new_tokens: Longest continuation.
        until: Texts before which the answer ends.
        temperature: 0 takes the most likely token.
        top_p: Sample from the most likely tokens that together have this probability; None for all.
        top_k: Sample from this number of most likely tokens; None for all.
        seed: Of the run, and of the request in it. An answer depends on them, not on the batch that it is in.
        special_tokens: Whether the answer shows special tokens, except the one that ends it.
        about: What is kept with the response, for readers.
    """

    id: str
    prompt: np.ndarray
    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: tuple[int, int] = (0, 0)
    special_tokens: bool = False
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Request = LikelihoodRequest | GenerationRequest
# {"log_likelihood": nats, "greedy": whether every token is the likeliest at its place, "tokens": scored}, or {"text":
# answer, "tokens": generated, "finish": "stop" or "length"}: the latter if the answer has max_new_tokens and would have
# continued. "cut" is the number of first tokens that a prompt lost, if any.
Response = Mapping[str, Any]
# From requests, all of one kind, to a response for each id.
Predict = Callable[[Sequence[Request]], Mapping[str, Response]]
