"""Attention as pure functions: rotary embedding, masked grouped-query attention, and the key-value cache.

Legend: B batch, L query tokens, S key tokens (cache slots), N query heads, K key-value heads, H head dimensions.
A token's position is its index in its own sequence; position -1 marks padding, which nothing attends to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.rope import Rope


class LayerCache(NamedTuple):
    """Keys and values of one layer. A ring: position p is kept in slot p mod S.

    Attributes:
        keys: (B, S, K, H), rotary embedding already applied.
        values: (B, S, K, H).
        positions: (B, S) int32; -1 for an empty slot.
    """

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]


Cache = tuple[LayerCache, ...]


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """An empty cache, one entry per layer.

    Args:
        config: The decoder.
        batch: B, number of sequences.
        capacity: Longest sequence, prompt and continuation, in tokens. A layer with a window keeps only so many.
        dtype: Of keys and values.
    """

    def layer(window: int | None) -> LayerCache:
        slots = capacity if window is None else min(window, capacity)
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
        return LayerCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), -1, jnp.int32)
        )

    return tuple(layer(window) for window in config.windows)


def write_cache(
    cache: LayerCache,
    k_BxLxKxH: Float[Array, "B L K H"],
    v_BxLxKxH: Float[Array, "B L K H"],
    positions_BxL: Int[Array, "B L"],
) -> LayerCache:
    """Put tokens into their slots; padding and tokens that later ones of the same call push out are dropped.

    Args:
        cache: The layer's cache.
        k_BxLxKxH: New keys.
        v_BxLxKxH: New values.
        positions_BxL: Their positions; -1 for padding.
    """
    batch, slots = cache.positions.shape
    newest_B = positions_BxL.max(axis=1, keepdims=True)
    kept_BxL = (positions_BxL >= 0) & (positions_BxL > newest_B - slots)
    slot_BxL = jnp.where(kept_BxL, positions_BxL % slots, slots)  # out of range: dropped by the scatter
    row_Bx1 = jnp.arange(batch)[:, None]
    return LayerCache(
        cache.keys.at[row_Bx1, slot_BxL].set(k_BxLxKxH.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[row_Bx1, slot_BxL].set(v_BxLxKxH.astype(cache.values.dtype), mode="drop"),
        cache.positions.at[row_Bx1, slot_BxL].set(positions_BxL, mode="drop"),
    )


def extend(
    cache: LayerCache | None,
    k_BxLxKxH: Float[Array, "B L K H"],
    v_BxLxKxH: Float[Array, "B L K H"],
    positions_BxL: Int[Array, "B L"],
) -> tuple[LayerCache, LayerCache | None]:
    """What the new tokens attend to, and the cache after them.

    Without a cache they attend to each other. With one, to the cache after they are written; several tokens into a
    ring could push out what the first of them still sees, so they attend to the old cache and to themselves.

    Args:
        cache: The layer's cache or None.
        k_BxLxKxH: New keys.
        v_BxLxKxH: New values.
        positions_BxL: Their positions; -1 for padding.

    Returns:
        What is attended to (as a `LayerCache` of any number of slots) and the new cache (None without one).
    """
    fresh = LayerCache(k_BxLxKxH, v_BxLxKxH, positions_BxL)
    if cache is None:
        return fresh, None
    written = write_cache(cache, k_BxLxKxH, v_BxLxKxH, positions_BxL)
    if positions_BxL.shape[1] == 1:
        return written, written
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache, fresh)
    return both, written


def rotate(
    x_BxLxNxH: Float[Array, "B L N H"], positions_BxL: Int[Array, "B L"], rope: Rope
) -> Float[Array, "B L N H"]:
    """Apply a rotary embedding to every head, pairing dimension i with i + H/2 as Hugging Face does.

    Args:
        x_BxLxNxH: Queries or keys.
        positions_BxL: Token positions.
        rope: The embedding.
    """
    head_dim = x_BxLxNxH.shape[-1]
    frequencies = jnp.asarray(rope.inverse_frequencies(head_dim).astype(np.float32))
    angle_BxLx1xh = positions_BxL[..., None, None].astype(jnp.float32) * frequencies
    cos = jnp.cos(angle_BxLx1xh) * rope.attention_factor
    sin = jnp.sin(angle_BxLx1xh) * rope.attention_factor
    first, second = jnp.split(x_BxLxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxNxH.dtype)


def attend(
    q_BxLxNxH: Float[Array, "B L N H"],
    attended: LayerCache,
    positions_BxL: Int[Array, "B L"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B L N H"]:
    """Causal grouped-query attention; logits and softmax in float32.

    Args:
        q_BxLxNxH: Queries, rotated.
        attended: Keys, values and their positions.
        positions_BxL: Positions of the queries.
        scale: Multiplies the logits.
        window: How many tokens a query sees, itself included; None for all before it.
        soft_cap: Bounds the logits to (-soft_cap, soft_cap) by tanh.
    """
    batch, length, heads, head_dim = q_BxLxNxH.shape
    kv_heads = attended.keys.shape[2]
    q_BxKxGxLxH = q_BxLxNxH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    query_BxLx1, key_Bx1xS = positions_BxL[:, :, None], attended.positions[:, None, :]
    seen_BxLxS = (key_Bx1xS >= 0) & (key_Bx1xS <= query_BxLx1)
    if window is not None:
        seen_BxLxS &= query_BxLx1 - key_Bx1xS < window

    def one_head(q_GxLxH: Array, k_SxH: Array, v_SxH: Array, seen_LxS: Array) -> Array:
        """Attention of the query heads that share one key-value head, in one sequence."""
        q_QxH = q_GxLxH.reshape(-1, head_dim)
        logits = jnp.einsum("qh,sh->qs", q_QxH, k_SxH, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(jnp.tile(seen_LxS, (heads // kv_heads, 1)), logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v_SxH.dtype)
        out = jnp.einsum("qs,sh->qh", weights, v_SxH, preferred_element_type=jnp.float32)
        return out.reshape(q_GxLxH.shape).astype(q_GxLxH.dtype)

    k_BxKxSxH, v_BxKxSxH = attended.keys.swapaxes(1, 2), attended.values.swapaxes(1, 2)

    def one_row(q_KxGxLxH: Array, k_KxSxH: Array, v_KxSxH: Array, seen_LxS: Array) -> Array:
        return jax.vmap(one_head, in_axes=(0, 0, 0, None))(q_KxGxLxH, k_KxSxH, v_KxSxH, seen_LxS)

    def in_turn(q: Array, k: Array, v: Array, seen: Array) -> Array:
        # A CPU multiplies one matrix at a time several times faster than a batch of them.
        heads_of_row = lambda row: jax.lax.map(lambda head: one_head(*head, row[3]), row[:3])  # noqa: E731
        return jax.lax.map(heads_of_row, (q, k, v, seen))

    arguments = (q_BxKxGxLxH, k_BxKxSxH, v_BxKxSxH, seen_BxLxS)
    if length == 1:
        out = jax.vmap(one_row)(*arguments)
    else:
        out = jax.lax.platform_dependent(*arguments, cpu=in_turn, default=jax.vmap(one_row))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
