"""How the next token is chosen from logits.

Legend: B batch, V vocabulary, C candidates.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token; greedy unless told otherwise.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token, whatever else is set.
        top_k: Choose among this many most likely tokens; None for all.
        top_p: Choose among the fewest most likely tokens whose probabilities, after the temperature and top_k,
            add up to at least this (nucleus sampling, arXiv 1904.09751); None for all.

    Raises:
        UsageError: If a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number such as 0.8")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise UsageError(f"top_k is {self.top_k}; expected a whole number from 1, or none for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected a number above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether the choice is not random."""
        return self.temperature == 0


def sample(keys_B: Key[Array, B], logits_BxV: Float[Array, "B V"], sampling: Sampling) -> Int[Array, B]:
    """Choose one token for every row, with the row's own key: no row depends on another.

    Args:
        keys_B: One key per row; not read if greedy.
        logits_BxV: Logits.
        sampling: How to choose.

    Returns:
        Token ids, int32. Equal logits count as ordered by id, lowest first.
    """
    if sampling.greedy:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    scores_BxC, ids_BxC = candidates(logits_BxV, sampling)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, scores_BxC)
    return jnp.take_along_axis(ids_BxC, choice_B[:, None], axis=1)[:, 0]


def candidates(logits_BxV: Float[Array, "B V"], sampling: Sampling) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """The tokens that a sampling may choose from.

    Args:
        logits_BxV: Logits.
        sampling: A sampling that is not greedy.

    Returns:
        Unnormalised log probabilities, -inf for what top_p excludes, and token ids in int32. In descending order if
        there is a top_k or a top_p, else by id.
    """
    batch, vocab = logits_BxV.shape
    # The greatest is made zero before dividing, or a tiny temperature would overflow to inf - inf.
    logits_BxV = logits_BxV.astype(jnp.float32)
    scores_BxC = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return scores_BxC, jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (batch, vocab))
    scores_BxC, ids_BxC = jax.lax.top_k(scores_BxC, min(sampling.top_k or vocab, vocab))
    if sampling.top_p is not None:
        p_BxC = jax.nn.softmax(scores_BxC, axis=-1)
        before_BxC = jnp.cumsum(p_BxC, axis=-1) - p_BxC
        # The first is kept even if rounding makes what is before it more than nothing.
        kept_BxC = (before_BxC < sampling.top_p).at[:, 0].set(True)
        scores_BxC = jnp.where(kept_BxC, scores_BxC, -jnp.inf)
    return scores_BxC, ids_BxC.astype(jnp.int32)
