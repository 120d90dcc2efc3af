"""Attention as pure functions: rotary embedding, masked grouped-query attention, and the key-value cache.

Legend: B batch, L query tokens, S key tokens (cache slots), N query heads, K key-value heads, H head dimensions.
A token's position is its index in its own sequence; position -1 marks padding, which nothing attends to.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.rope import Rope


class LayerCache(NamedTuple):
    """Keys and values of one layer. A ring: position p is kept in slot p mod S.

    The axes are in the order in which one query reads them fastest: each head's keys are a matrix whose rows are
    dimensions, and no axis has to be moved in a step that reads all of it.

    Attributes:
        keys: (B, K, H, S), rotary embedding already applied.
        values: (B, K, S, H).
        positions: (B, S) int32; -1 for an empty slot.
    """

    keys: Float[Array, "B K H S"]
    values: Float[Array, "B K S H"]
    positions: Int[Array, "B S"]


Cache = tuple[LayerCache, ...]


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """An empty cache, one entry per layer and iteration.

    Args:
        config: The decoder.
        batch: B, number of sequences.
        capacity: Longest sequence, prompt and continuation, in tokens. A layer with a window keeps only its window.
            0 for a cache that stores the tokens of one call in order; see `to_rings`.
        dtype: Of keys and values.
    """

    def layer(window: int | None) -> LayerCache:
        slots = capacity if window is None else min(window, capacity)
        heads, head_dim = config.num_kv_heads, config.head_dim
        return LayerCache(
            jnp.zeros((batch, heads, head_dim, slots), dtype),
            jnp.zeros((batch, heads, slots, head_dim), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
        )

    return tuple(layer(window) for window in config.windows * config.iterations)


@partial(jax.jit, static_argnames=("config", "capacity"))
def to_rings(config: DecoderConfig, prompts: Cache, capacity: int) -> Cache:
    """The cache for decoding, from one that stored prompts in order.

    A prompt that is read directly into rings would also attend to all of their empty slots.

    Args:
        config: The decoder.
        prompts: A cache of capacity 0 after the prompts: positions 0, 1, 2, ... of every sequence, then padding.
        capacity: As for `init_cache`.
    """
    slots = [capacity if window is None else min(window, capacity) for window in config.windows * config.iterations]
    return tuple(to_ring(*both) for both in zip(prompts, slots, strict=True))


def to_ring(cache: LayerCache, slots: int) -> LayerCache:
    """The ring of one layer; see `to_rings`.

    Args:
        cache: The layer's prompts in order.
        slots: S of the ring.
    """
    length = cache.positions.shape[1]
    if length <= slots:
        after = (0, slots - length)
        return LayerCache(
            jnp.pad(cache.keys, ((0, 0), (0, 0), (0, 0), after)),
            jnp.pad(cache.values, ((0, 0), (0, 0), after, (0, 0))),
            jnp.pad(cache.positions, ((0, 0), after), constant_values=-1),
        )
    # The newest position with the slot as remainder.
    newest_Bx1 = cache.positions.max(axis=1, keepdims=True)
    position_BxS = newest_Bx1 - (newest_Bx1 - jnp.arange(slots)) % slots
    index_BxS = jnp.maximum(position_BxS, 0)
    return LayerCache(
        jnp.take_along_axis(cache.keys, index_BxS[:, None, None, :], axis=3),
        jnp.take_along_axis(cache.values, index_BxS[:, None, :, None], axis=2),
        jnp.maximum(position_BxS, -1),
    )


def write_cache(
    cache: LayerCache,
    k_BxLxKxH: Float[Array, "B L K H"],
    v_BxLxKxH: Float[Array, "B L K H"],
    positions_BxL: Int[Array, "B L"],
) -> LayerCache:
    """Write tokens into their slots; padding and tokens that later ones of the same call overwrite are dropped.

    Args:
        cache: The layer's cache.
        k_BxLxKxH: New keys.
        v_BxLxKxH: New values.
        positions_BxL: Their positions; -1 for padding.
    """
    k_BxLxKxH, v_BxLxKxH = k_BxLxKxH.astype(cache.keys.dtype), v_BxLxKxH.astype(cache.values.dtype)
    arguments = (cache, k_BxLxKxH, v_BxLxKxH, positions_BxL)
    if positions_BxL.shape == (1, 1):
        return jax.lax.platform_dependent(*arguments, cpu=_write_one, default=_write_any)
    return _write_any(*arguments)


def _write_any(cache: LayerCache, k_BxLxKxH: Array, v_BxLxKxH: Array, positions_BxL: Array) -> LayerCache:
    batch, slots = cache.positions.shape
    newest_B = positions_BxL.max(axis=1, keepdims=True)
    kept_BxL = (positions_BxL >= 0) & (positions_BxL > newest_B - slots)
    slot_BxL = jnp.where(kept_BxL, positions_BxL % slots, slots)  # out of range: dropped by the scatter
    row_Bx1 = jnp.arange(batch)[:, None]
    return LayerCache(
        cache.keys.at[row_Bx1, :, :, slot_BxL].set(k_BxLxKxH, mode="drop"),
        cache.values.at[row_Bx1, :, slot_BxL].set(v_BxLxKxH, mode="drop"),
        cache.positions.at[row_Bx1, slot_BxL].set(positions_BxL, mode="drop"),
    )


def _write_one(cache: LayerCache, k_1x1xKxH: Array, v_1x1xKxH: Array, position_1x1: Array) -> LayerCache:
    """One token of one sequence.

    XLA's CPU compiler fuses a plain write with the next read of the cache, and therefore copies the cache twice a step;
    it does not fuse across a condition, and writes in place.
    """
    slot = position_1x1[0, 0] % cache.positions.shape[1]

    def write(cache: LayerCache) -> LayerCache:
        return LayerCache(
            jax.lax.dynamic_update_slice(cache.keys, k_1x1xKxH.transpose(0, 2, 3, 1), (0, 0, 0, slot)),
            jax.lax.dynamic_update_slice(cache.values, v_1x1xKxH.swapaxes(1, 2), (0, 0, slot, 0)),
            jax.lax.dynamic_update_slice(cache.positions, position_1x1, (0, slot)),
        )

    return jax.lax.cond(position_1x1[0, 0] >= 0, write, lambda cache: cache, cache)


def extend(
    cache: LayerCache | None,
    k_BxLxKxH: Float[Array, "B L K H"],
    v_BxLxKxH: Float[Array, "B L K H"],
    positions_BxL: Int[Array, "B L"],
) -> tuple[LayerCache, LayerCache | None]:
    """The keys and values that the new tokens attend to, and the cache after them.

    Without a cache they attend to each other. With one, they attend to the cache after they are written. Several tokens
    written into a ring could overwrite what the first of them still attends to, so they attend to the old cache and to
    themselves. A cache without slots becomes the tokens in order.

    Args:
        cache: The layer's cache or None.
        k_BxLxKxH: New keys.
        v_BxLxKxH: New values.
        positions_BxL: Their positions; -1 for padding.

    Returns:
        The keys and values to attend to (a `LayerCache` of any number of slots), and the new cache (None without one).
    """
    fresh = LayerCache(k_BxLxKxH.transpose(0, 2, 3, 1), v_BxLxKxH.swapaxes(1, 2), positions_BxL)
    if cache is None:
        return fresh, None
    fresh = LayerCache(fresh.keys.astype(cache.keys.dtype), fresh.values.astype(cache.values.dtype), positions_BxL)
    if cache.positions.shape[1] == 0:
        return fresh, fresh
    written = write_cache(cache, k_BxLxKxH, v_BxLxKxH, positions_BxL)
    if positions_BxL.shape[1] == 1:
        return written, written
    both = LayerCache(
        jnp.concatenate([cache.keys, fresh.keys], axis=3),
        jnp.concatenate([cache.values, fresh.values], axis=2),
        jnp.concatenate([cache.positions, fresh.positions], axis=1),
    )
    return both, written


# Number of tokens from which on the angles are computed apart from what they rotate.
_MANY_TOKENS = 128


def rotate(
    x_BxLxNxH: Float[Array, "B L N H"], positions_BxL: Int[Array, "B L"], rope: Rope | None
) -> Float[Array, "B L N H"]:
    """Apply a rotary embedding to every head, pairing dimension i with i + E/2 of the E rotated ones, or with i + 1.

    Args:
        x_BxLxNxH: Queries or keys.
        positions_BxL: Token positions.
        rope: The embedding; None for a layer without one.
    """
    if rope is None:
        return x_BxLxNxH
    head_dim = x_BxLxNxH.shape[-1]
    frequencies = jnp.asarray(rope.inverse_frequencies(head_dim).astype(np.float32))
    angle_BxLx1xh = positions_BxL[..., None, None].astype(jnp.float32) * frequencies

    def turn(angle: Array) -> tuple[Array, Array]:
        return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor

    if math.prod(positions_BxL.shape) < _MANY_TOKENS:
        cos, sin = turn(angle_BxLx1xh)
    else:
        # XLA's CPU compiler would compute them again for every head; it does not fuse across a condition.
        always = positions_BxL.ravel()[0] >= -1
        cos, sin = jax.lax.cond(always, turn, lambda angle: (angle, angle), angle_BxLx1xh)
    x32, rest = jnp.split(x_BxLxNxH.astype(jnp.float32), [rope.rotated(head_dim)], axis=-1)
    first, second = (x32[..., ::2], x32[..., 1::2]) if rope.interleaved else jnp.split(x32, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(turned, axis=-1).reshape(x32.shape) if rope.interleaved else jnp.concatenate(turned, axis=-1)
    whole = rotated if rest.shape[-1] == 0 else jnp.concatenate([rotated, rest], axis=-1)
    return whole.astype(x_BxLxNxH.dtype)


# Number of queries that a CPU processes at a time. No query sees a later key, so that half of the keys are skipped.
_QUERIES = 128


# jit: outside of a compiled model the loops below would be compiled again at every call.
@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "ordered"))
def attend(
    q_BxLxNxH: Float[Array, "B L N H"],
    attended: LayerCache,
    positions_BxL: Int[Array, "B L"],
    starts_BxL: Int[Array, "B L"] | None = None,
    own: LayerCache | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    ordered: bool = False,
) -> Float[Array, "B L N H"]:
    """Causal grouped-query attention; logits and softmax in float32.

    Args:
        q_BxLxNxH: Queries, rotated.
        attended: Keys, values and their positions.
        positions_BxL: Positions of the queries.
        starts_BxL: Lowest position that each query sees; None for 0.
        own: Keys and values of the queries' own tokens, equal to those of `attended` at their positions. Each query
            then takes those of its own token from here and all others from there: one derivative with `attended` held
            constant is that of every token separately. The queries may be some of the tokens.
        scale: Multiplies the logits.
        window: How many tokens a query sees, itself included; None for all before it.
        soft_cap: Bounds the logits to (-soft_cap, soft_cap) by tanh.
        ordered: Queries and keys are the same tokens in one order, so that none sees a key of a higher index.
    """
    assert own is None or not ordered
    batch, length, heads, head_dim = q_BxLxNxH.shape
    kv_heads = attended.keys.shape[1]
    q_BxKxGxLxH = q_BxLxNxH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    query_BxLx1, key_Bx1xS = positions_BxL[:, :, None], attended.positions[:, None, :]
    seen_BxLxS = (key_Bx1xS >= 0) & (key_Bx1xS <= query_BxLx1)
    if starts_BxL is not None:
        seen_BxLxS &= key_Bx1xS >= starts_BxL[:, :, None]
    if window is not None:
        seen_BxLxS &= query_BxLx1 - key_Bx1xS < window

    # Recomputed in the backward pass: stored attention weights would have to be read from memory, one number for each
    # pair of tokens. On a CPU that takes three times as long.
    @jax.checkpoint
    def one_head(q_GxLxH: Array, kv: tuple[Array, ...], where: tuple[Array, ...]) -> Array:
        """Attention of the query heads that share one key-value head, in one sequence."""
        k_HxS, v_SxH, *own_kv = kv
        seen_LxS, *slots = where
        q_QxH = q_GxLxH.reshape(-1, head_dim)
        logits = jnp.einsum("qh,hs->qs", q_QxH, k_HxS, preferred_element_type=jnp.float32) * scale
        if own_kv:  # adds 0 to the value, and a derivative
            (slot_L,) = slots
            own_LxS = jax.nn.one_hot(slot_L, k_HxS.shape[1])
            live_LxH = (own_kv[0] - k_HxS[:, slot_L]).T
            live_GxL = jnp.einsum("glh,lh->gl", q_GxLxH, live_LxH, preferred_element_type=jnp.float32) * scale
            logits += (live_GxL[:, :, None] * own_LxS).reshape(logits.shape)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(jnp.tile(seen_LxS, (heads // kv_heads, 1)), logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v_SxH.dtype)
        out = jnp.einsum("qs,sh->qh", weights, v_SxH, preferred_element_type=jnp.float32)
        if own_kv:
            weights_GxLxS = weights.reshape(-1, *own_LxS.shape)
            to_own_GxL = jnp.take_along_axis(weights_GxLxS, slot_L[None, :, None], axis=2)[..., 0]
            live_GxLxH = to_own_GxL[:, :, None] * (own_kv[1] - v_SxH[slot_L])
            out += live_GxLxH.astype(jnp.float32).reshape(out.shape)
        return out.reshape(q_GxLxH.shape).astype(q_GxLxH.dtype)

    def one_row(q_KxGxLxH: Array, kv: tuple[Array, ...], where: tuple[Array, ...]) -> Array:
        return jax.vmap(one_head, in_axes=(0, 0, None))(q_KxGxLxH, kv, where)

    def in_turn(q: Array, kv: tuple[Array, ...], where: tuple[Array, ...]) -> Array:
        # A CPU multiplies one matrix at a time several times faster than a batch of them.
        def heads_of_row(row: tuple[Array, tuple[Array, ...], tuple[Array, ...]]) -> Array:
            return jax.lax.map(lambda head: in_blocks(head[0], head[1], row[2]), row[:2])

        def in_blocks(q_GxLxH: Array, kv: tuple[Array, ...], where: tuple[Array, ...]) -> Array:
            if not ordered or length <= _QUERIES:
                return one_head(q_GxLxH, kv, where)
            (k_HxS, v_SxH), (seen_LxS,) = kv, where
            parts = []
            for begin in range(0, length, _QUERIES):
                end = min(begin + _QUERIES, length)
                keys = k_HxS[:, :end], v_SxH[:end]
                parts.append(one_head(q_GxLxH[:, begin:end], keys, (seen_LxS[begin:end, :end],)))
            return jnp.concatenate(parts, axis=1)

        return jax.lax.map(heads_of_row, (q, kv, where))

    kv: tuple[Array, ...] = (attended.keys, attended.values)
    where: tuple[Array, ...] = (seen_BxLxS,)
    if own is not None:
        kv += (own.keys, own.values)
        # The index of each query's own token among the keys; arbitrary for padding, whose output is ignored.
        where += (jnp.argmax(key_Bx1xS == query_BxLx1, axis=2),)
    arguments = (q_BxKxGxLxH, kv, where)
    if length == 1:
        out = jax.vmap(one_row)(*arguments)
    else:
        out = jax.lax.platform_dependent(*arguments, cpu=in_turn, default=jax.vmap(one_row))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
