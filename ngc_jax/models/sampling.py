"""How the next token is chosen from logits.

A compiled program takes a sampling as arrays (`SamplingArrays`), so that another temperature does not recompile.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from ngc_jax.errors import UsageError

_INFINITE_BITS = 0x7F800000
_SMALLEST = float(np.finfo(np.float32).tiny)
_NO_TOP_K = 2**31 - 1


class SamplingArrays(NamedTuple):
    """A `Sampling` as arguments of a compiled program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token; greedy by default.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token, whatever else is set.
        top_k: Choose among the k most likely tokens; None for all.
        top_p: Choose among the fewest most likely tokens whose probabilities, after the temperature and top_k,
            add up to at least this (nucleus sampling, arXiv 1904.09751); None for all.

    Raises:
        UsageError: If a setting is out of range.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9).greedy
        False
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number such as 0.8")
        if self.top_k is not None and not (self.top_k >= 1 and self.top_k % 1 == 0):
            raise UsageError(f"top_k is {self.top_k}; expected a whole number from 1, or none for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected a number above 0 and at most 1, or none for all tokens")

    @property
    def greedy(self) -> bool:
        """Whether the choice is not random."""
        return self.temperature == 0

    @property
    def arrays(self) -> SamplingArrays:
        """The settings as arrays."""
        return SamplingArrays(
            # A subnormal number would be flushed to zero.
            jnp.float32(max(self.temperature, _SMALLEST) if self.temperature else 0.0),
            jnp.int32(_NO_TOP_K if self.top_k is None else min(self.top_k, _NO_TOP_K)),
            jnp.float32(1.0 if self.top_p is None else self.top_p),
        )


def sample(keys_B: Key[Array, " B"], logits_BxV: Float[Array, "B V"], sampling: SamplingArrays) -> Int[Array, " B"]:
    """Choose one token for every row, with the row's own key: no row depends on another.

    Args:
        keys_B: One key per row; not read if greedy.
        logits_BxV: Logits.
        sampling: How to choose.

    Returns:
        Token ids, int32. Greedy: the lowest id of the most likely tokens.
    """

    def greedy() -> Array:
        return jnp.argmax(logits_BxV, axis=-1)

    def random(scores_BxV: Array) -> Array:
        return jax.vmap(jax.random.categorical)(keys_B, scores_BxV)

    everything = (sampling.top_k >= logits_BxV.shape[-1]) & (sampling.top_p >= 1)
    tokens_B = jax.lax.switch(
        jnp.where(sampling.temperature == 0, 0, jnp.where(everything, 1, 2)),
        [
            greedy,
            lambda: random(-_distances(logits_BxV, sampling.temperature)),
            lambda: random(scores(logits_BxV, sampling)),
        ],
    )
    return tokens_B.astype(jnp.int32)


def scores(logits_BxV: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """Unnormalised log probabilities from which a token is drawn.

    Args:
        logits_BxV: Logits.
        sampling: A sampling that is not greedy.

    Returns:
        Zero for the most likely token, -inf for excluded ones. Tokens exactly as likely as the last one that top_k or
        top_p admits are admitted too.
    """
    distance_BxV = _distances(logits_BxV, sampling.temperature)
    count_BxV = jnp.ones_like(distance_BxV, jnp.int32)
    in_k_BxV = _nearest(distance_BxV, count_BxV, jnp.minimum(sampling.top_k, logits_BxV.shape[-1]))
    p_BxV = jnp.where(in_k_BxV, jnp.exp(-distance_BxV), 0.0)
    # With rounding, the least likely token might not be needed to reach the sum.
    mass_B = jnp.where(sampling.top_p < 1, sampling.top_p * p_BxV.sum(axis=-1), jnp.inf)
    in_p_BxV = _nearest(distance_BxV, p_BxV, mass_B)
    return jnp.where(in_k_BxV & in_p_BxV, -distance_BxV, -jnp.inf)


def _distances(logits_BxV: Float[Array, "B V"], temperature: Float[Array, ""]) -> Float[Array, "B V"]:
    """Distance of every logit from the greatest, divided by the temperature; avoids inf - inf at any temperature."""
    logits_BxV = logits_BxV.astype(jnp.float32)
    return (logits_BxV.max(axis=-1, keepdims=True) - logits_BxV) / temperature


def _nearest(distance_BxV: Float[Array, "B V"], weight_BxV: Num[Array, "B V"], mass_B: Num[Array, "*B"]) -> Array:
    """Which tokens are within the smallest distance that contains this much weight; bool, (B, V).

    Nonnegative floats have the same order as their bits, so a bisection of the bits finds that distance exactly: 31
    sums, whereas sorting a large vocabulary costs a considerable part of the model's time.
    """
    bits_BxV = jax.lax.bitcast_convert_type(distance_BxV, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        within_B = jnp.where(bits_BxV <= middle_B[:, None], weight_BxV, 0).sum(axis=-1)
        enough_B = within_B >= mass_B
        return jnp.where(enough_B, low_B, middle_B + 1), jnp.where(enough_B, middle_B, high_B)

    rows = distance_BxV.shape[:1]
    bounds = (jnp.zeros(rows, jnp.int32), jnp.full(rows, _INFINITE_BITS, jnp.int32))
    _, limit_B = jax.lax.fori_loop(0, 31, halve, bounds)
    return bits_BxV <= limit_B[:, None]
