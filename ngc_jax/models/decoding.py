"""Decoding as pure functions: prompts in one pass, then a loop on the device.

`prefill` reads prompts into a cache, `begin` also chooses the first tokens, `decode` continues from there; or
`speculation.speculate`, with the help of a smaller model.

A token's key is the row's key with the token's position folded in, so that a row's tokens depend neither on its batch
nor on the chunks in which it is decoded.

Legend: B batch, L prompt tokens with padding, V vocabulary, T tokens decoded in one call, Z stop tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ngc_jax.models.decoder import Decoder
from ngc_jax.models.latent_cache import MixedCache, init_latent_cache, to_rings
from ngc_jax.models.sampling import SamplingArrays, sample
from ngc_jax.types import Params

MAX_STEPS = 64
"""Most tokens that one call of `decode` makes. Control returns to the host between calls, so that Ctrl-C works."""

NO_TOKEN = -1
"""Marks in decoded tokens that the row had ended."""


class DecodeState(NamedTuple):
    """The state of decoding a batch.

    Attributes:
        cache: Of all tokens before the last.
        tokens: (B,) the last token, which was emitted but not yet read.
        positions: (B,) its position.
        remaining: (B,) number of tokens the row may still emit; 0 once it has stopped.
        keys: (B,) each row's key.
    """

    cache: MixedCache
    tokens: Int[Array, B]
    positions: Int[Array, B]
    remaining: Int[Array, B]
    keys: Key[Array, B]


def prefill(
    decoder: Decoder, params: Params, tokens_BxL: Int[Array, "B L"], lengths_B: Int[Array, " B"], capacity: int
) -> tuple[Float[Array, "B V"], MixedCache]:
    """Read prompts.

    Args:
        decoder: The module.
        params: Its parameters.
        tokens_BxL: Prompts, padded on the right with any token.
        lengths_B: Number of tokens in each prompt, without padding, at least 1.
        capacity: Slots of the cache: the longest sequence, prompt and continuation, in tokens.

    Returns:
        Logits of the token after each prompt, in float32, and the cache.
    """
    # Two programs: another capacity does not recompile the model.
    logits_BxV, prompts = _read(decoder, params, tokens_BxL, lengths_B)
    return logits_BxV, to_rings(decoder.config, prompts, capacity)


def begin(
    decoder: Decoder,
    params: Params,
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    remaining_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    stop_Z: Int[Array, " Z"],
    *,
    capacity: int,
    sampling: SamplingArrays,
) -> tuple[Int[Array, " B"], DecodeState]:
    """Read prompts and choose the first token after each.

    Args:
        decoder: The module.
        params: Its parameters.
        tokens_BxL: Prompts, padded on the right with any token.
        lengths_B: Number of tokens in each prompt, without padding, at least 1.
        remaining_B: Number of tokens each row may emit, at least 1.
        keys_B: Each row's key.
        stop_Z: Tokens after which a row ends.
        capacity: Slots of the cache: the longest sequence, prompt and continuation, in tokens.
        sampling: How to choose tokens.

    Returns:
        The first tokens and the state for `decode`.
    """
    logits_BxV, cache = prefill(decoder, params, tokens_BxL, lengths_B, capacity)
    tokens_B, remaining_B = _first(logits_BxV, lengths_B, remaining_B, keys_B, stop_Z, sampling)
    # A copy: the state will be donated, but the caller keeps the first tokens.
    state = DecodeState(cache, jnp.copy(tokens_B), jnp.copy(lengths_B), remaining_B, jnp.copy(keys_B))
    return tokens_B, state


@partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    steps: Int[Array, ""],
    stop_Z: Int[Array, Z],
    *,
    sampling: SamplingArrays,
) -> tuple[Int[Array, "B T"], DecodeState]:
    """Continue a batch on the device, until `steps` tokens are made or every row has ended.

    The given state is donated: its cache is updated in place.

    Args:
        decoder: The module.
        params: Its parameters.
        state: From `begin` or an earlier call.
        steps: Number of tokens to make; more than `MAX_STEPS` means `MAX_STEPS`.
        stop_Z: Tokens after which a row ends.
        sampling: How to choose tokens.

    Returns:
        Tokens, T = `MAX_STEPS`, with `NO_TOKEN` after the end of a row and after `steps`; and the new state.
    """
    steps = jnp.minimum(steps, MAX_STEPS)

    def unfinished(carry: tuple[Array, Array, DecodeState]) -> Array:
        step, _, state = carry
        return (step < steps) & (state.remaining > 0).any()

    def advance(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        step, emitted_BxT, state = carry
        active_B = state.remaining > 0
        # A row that has ended is padding in the step of the others.
        read_at_B = jnp.where(active_B, state.positions, -1)
        logits_Bx1xV, cache = apply(decoder, params, "__call__", state.tokens[:, None], read_at_B[:, None], state.cache)
        positions_B = jnp.where(active_B, state.positions + 1, state.positions)
        chosen_B = choose(state.keys, positions_B, logits_Bx1xV[:, 0], sampling)
        tokens_B = jnp.where(active_B, chosen_B, state.tokens)
        remaining_B = jnp.where(active_B & ~jnp.isin(tokens_B, stop_Z), state.remaining - 1, 0)
        emitted_BxT = emitted_BxT.at[:, step].set(jnp.where(active_B, tokens_B, NO_TOKEN))
        return step + 1, emitted_BxT, DecodeState(cache, tokens_B, positions_B, remaining_B, state.keys)

    nothing_BxT = jnp.full((state.tokens.shape[0], MAX_STEPS), NO_TOKEN, jnp.int32)
    _, emitted_BxT, state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), nothing_BxT, state))
    return emitted_BxT, state


@partial(jax.jit, static_argnames="decoder")
def _read(decoder: Decoder, params: Params, tokens_BxL: Array, lengths_B: Array) -> tuple[Array, MixedCache]:
    """Logits after each prompt and a cache of the prompts in order."""
    batch, length = tokens_BxL.shape
    index_L = jnp.arange(length, dtype=jnp.int32)
    positions_BxL = jnp.where(index_L < lengths_B[:, None], index_L, -1)
    cache = init_latent_cache(decoder.config, decoder.plan, decoder.cache, batch, 0, decoder.compute_dtype)
    x_BxLxD, cache = apply(decoder, params, "hidden", tokens_BxL, positions_BxL, cache)
    # Only the last token of each prompt is unembedded.
    x_BxD = jnp.take_along_axis(x_BxLxD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return apply(decoder, params, "logits", x_BxD), cache


@jax.jit
def _first(
    logits_BxV: Array,
    lengths_B: Array,
    remaining_B: Array,
    keys_B: Array,
    stop_Z: Array,
    sampling: SamplingArrays,
) -> tuple[Array, Array]:
    """The first tokens, and the number of tokens that may follow them."""
    tokens_B = choose(keys_B, lengths_B, logits_BxV, sampling)
    return tokens_B, jnp.where(jnp.isin(tokens_B, stop_Z), 0, remaining_B - 1)


def end_rows(state: Any, ended_B: Any) -> Any:
    """A state, of this module or of `speculation`, in which some rows (B,) have ended."""
    if not isinstance(state, DecodeState):
        return state._replace(decode=end_rows(state.decode, ended_B))
    return state._replace(remaining=jnp.where(ended_B, 0, state.remaining))


def choose(
    keys_B: Key[Array, " B"], positions_B: Int[Array, " B"], logits_BxV: Float[Array, "B V"], sampling: SamplingArrays
) -> Int[Array, " B"]:
    """Sample the token at a position of each row, with the row's key and the position folded in."""
    return sample(jax.vmap(jax.random.fold_in)(keys_B, positions_B), logits_BxV, sampling)


def apply(decoder: Decoder, params: Params, method: str, *arguments: Any) -> Any:
    """Call a method of the module."""
    return decoder.apply({"params": params}, *arguments, method=method)
