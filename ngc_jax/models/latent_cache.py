"""A key-value cache that keeps the signals of groups in place of the keys and values that are read from them.

Keys and values of a group are linear in its signal, an r-dimensional message per token. Where r is smaller than what it
replaces, the signal is kept. The result is the same up to rounding:

- Keys are computed from the signals at every step: output states, bias, norm, rotary embedding.
- Values are not computed at all. A weighted sum of values is the same sum of signals, read by the output states once,
  plus the bias, since the weights of a query sum to 1.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps a latent vector in the same way, but
trains a separate rotary part, which is not needed where keys are computed again.

How attention reads it is in `latent_attention`.

Legend: B batch, L query tokens, S key tokens (cache slots), K key-value heads, H head dimensions, R signal width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.models.attention import LayerCache, to_ring
from ngc_jax.models.config import DecoderConfig, block_name

CacheKind = Literal["full", "latent", "auto"]
"""What a cache keeps: keys and values (`full`), signals wherever they are smaller (`latent`), or signals in place of
values only (`auto`)."""


class LatentCache(NamedTuple):
    """Keys and values of one layer, or the signals that they are read from. A ring, as `LayerCache`.

    Attributes:
        keys: (B, K, H, S), rotary embedding already applied; None where a signal takes their place.
        values: (B, K, S, H), or None.
        signals: (B, S, R) each: that of the keys' group, that of the values' group, or one of both.
        positions: (B, S) int32; -1 for an empty slot.
    """

    keys: Float[Array, "B K H S"] | None
    values: Float[Array, "B K S H"] | None
    signals: tuple[Float[Array, "B S R"], ...]
    positions: Int[Array, "B S"]


MixedCache = tuple[LayerCache | LatentCache, ...]


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """What the cache of a layer keeps.

    Attributes:
        keys: The group whose signal takes the place of keys; None where keys are kept.
        values: Likewise for values.
        widths: Width of each signal that is kept.
        numbers: Numbers kept for each token.
    """

    keys: str | None
    values: str | None
    widths: tuple[int, ...]
    numbers: int


def cache_layout(config: DecoderConfig, plan: Plan | None, kind: CacheKind = "latent") -> tuple[LayerLayout, ...]:
    """What the cache of every layer keeps: of all choices of `kind`, the one with the fewest numbers.

    Args:
        config: The decoder.
        plan: Its groups; None for a dense model, of which keys and values are kept.
        kind: `auto` keeps keys, since computing them from a signal takes more time than reading them.

    Raises:
        UsageError: If the kind is unknown.
    """
    if kind not in ("full", "latent", "auto"):
        raise UsageError(f"cache {kind!r} is unknown; expected full, latent or auto")
    return tuple(_layer_layout(config, plan or Plan(), layer, kind) for layer in range(config.num_layers))


def _layer_layout(config: DecoderConfig, plan: Plan, layer: int, kind: CacheKind) -> LayerLayout:
    size = config.num_kv_heads * config.head_dim
    of = {role: plan.group_of.get(block_name(layer, role)) for role in "kv"}
    width_of = {group.name: group.kernel.signal_width(group.rank) for group in of.values() if group is not None}
    k, v = (None if group is None else group.name for group in of.values())
    choices = []
    for keys, values in dict.fromkeys([(None, None), (None, v), (k, None), (k, v)]):
        kept = tuple(width_of[name] for name in dict.fromkeys((keys, values)) if name is not None)
        layout = LayerLayout(keys, values, kept, sum(kept) + size * (keys, values).count(None))
        if kind == "latent" or keys is values is None or (kind == "auto" and keys is None):
            choices.append(layout)
    return min(choices, key=lambda layout: layout.numbers)


def numbers_per_token(config: DecoderConfig, plan: Plan | None, kind: CacheKind = "latent") -> int:
    """Numbers that the caches of all layers keep for each token.

    Args:
        config: The decoder.
        plan: Its groups.
        kind: What the cache keeps.
    """
    return config.iterations * sum(layout.numbers for layout in cache_layout(config, plan, kind))


def bytes_per_token(config: DecoderConfig, plan: Plan | None, dtype: jnp.dtype | str) -> dict[str, int]:
    """Bytes for each token of a sequence, by kind of cache; a layer with a window keeps only its window.

    Args:
        config: The decoder.
        plan: Its groups.
        dtype: Of the cache.
    """
    size = jnp.dtype(dtype).itemsize
    return {kind: size * numbers_per_token(config, plan, kind) for kind in get_args(CacheKind)}


def init_latent_cache(
    config: DecoderConfig, plan: Plan | None, kind: CacheKind, batch: int, capacity: int, dtype: jnp.dtype
) -> MixedCache:
    """An empty cache, one entry per layer and iteration; a layer without a signal to keep has a `LayerCache`.

    Args:
        config: The decoder.
        plan: Its groups.
        kind: What to keep.
        batch: B, number of sequences.
        capacity: As for `attention.init_cache`.
        dtype: Of keys, values and signals.
    """
    heads, head_dim = config.num_kv_heads, config.head_dim

    def layer(window: int | None, layout: LayerLayout) -> LayerCache | LatentCache:
        slots = capacity if window is None else min(window, capacity)
        keys, values = (
            jnp.zeros((batch, heads, head_dim, slots), dtype),
            jnp.zeros((batch, heads, slots, head_dim), dtype),
        )
        positions = jnp.full((batch, slots), -1, jnp.int32)
        if not layout.widths:
            return LayerCache(keys, values, positions)
        return LatentCache(
            keys if layout.keys is None else None,
            values if layout.values is None else None,
            tuple(jnp.zeros((batch, slots, width), dtype) for width in layout.widths),
            positions,
        )

    layouts = cache_layout(config, plan, kind)
    return tuple(map(layer, config.windows * config.iterations, layouts * config.iterations))


@partial(jax.jit, static_argnames=("config", "capacity"))
def to_rings(config: DecoderConfig, prompts: MixedCache, capacity: int) -> MixedCache:
    """As `attention.to_rings`, for layers of both kinds.

    Args:
        config: The decoder.
        prompts: A cache of capacity 0 after the prompts: positions 0, 1, 2, ... of every sequence, then padding.
        capacity: As for `attention.init_cache`.
    """
    slots = [capacity if window is None else min(window, capacity) for window in config.windows * config.iterations]
    return tuple(
        to_latent_ring(cache, size) if isinstance(cache, LatentCache) else to_ring(cache, size)
        for cache, size in zip(prompts, slots, strict=True)
    )


def to_latent_ring(cache: LatentCache, slots: int) -> LatentCache:
    """The ring of a layer, from a cache that stored prompts in order.

    Args:
        cache: Positions 0, 1, 2, ... of every sequence, then padding.
        slots: S of the ring.
    """
    length = cache.positions.shape[1]
    if length <= slots:

        def padded(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, slots - length if axis == dimension else 0) for dimension in range(x.ndim)])

        held = map_arrays(padded, cache)
        empty = jnp.arange(slots) >= length
        return held._replace(positions=jnp.where(empty, -1, held.positions))
    # The newest position with the slot as remainder.
    newest_Bx1 = cache.positions.max(axis=1, keepdims=True)
    position_BxS = newest_Bx1 - (newest_Bx1 - jnp.arange(slots)) % slots
    index_BxS = jnp.maximum(position_BxS, 0)

    def taken(x: Array, axis: int) -> Array:
        others = [dimension for dimension in range(1, x.ndim) if dimension != axis]
        return jnp.take_along_axis(x, jnp.expand_dims(index_BxS, others), axis=axis)

    return map_arrays(taken, cache)._replace(positions=jnp.maximum(position_BxS, -1))


def map_arrays(function: Callable[..., Array], cache: LatentCache, *others: LatentCache) -> LatentCache:
    """Apply a function of an array, its axis of slots and the same arrays of other caches to all arrays."""

    def one(axis: int, *arrays: Array | None) -> Array | None:
        first, *rest = arrays
        return None if first is None else function(first, axis, *rest)

    return LatentCache(
        one(3, cache.keys, *(other.keys for other in others)),
        one(2, cache.values, *(other.values for other in others)),
        tuple(
            function(signal, 1, *rest)
            for signal, *rest in zip(cache.signals, *(other.signals for other in others), strict=True)
        ),
        function(cache.positions, 1, *(other.positions for other in others)),
    )


def write(cache: LatentCache, fresh: LatentCache) -> LatentCache:
    """Write tokens into their slots, as `attention.write_cache`.

    Args:
        cache: The layer's cache.
        fresh: The new tokens in order.
    """
    fresh = map_arrays(lambda old, axis, new: new.astype(old.dtype), cache, fresh)
    if fresh.positions.shape == (1, 1):
        return jax.lax.platform_dependent(cache, fresh, cpu=_write_one, default=_write_any)
    return _write_any(cache, fresh)


def _write_any(cache: LatentCache, fresh: LatentCache) -> LatentCache:
    (batch, slots), positions_BxL = cache.positions.shape, fresh.positions
    newest_Bx1 = positions_BxL.max(axis=1, keepdims=True)
    kept_BxL = (positions_BxL >= 0) & (positions_BxL > newest_Bx1 - slots)
    slot_BxL = jnp.where(kept_BxL, positions_BxL % slots, slots)  # out of range: dropped by the scatter
    row_Bx1 = jnp.arange(batch)[:, None]

    def put(old: Array, axis: int, new: Array) -> Array:
        where = (row_Bx1, *[slice(None)] * (axis - 1), slot_BxL)
        # Sequences and tokens come first where other dimensions are between their indices.
        return old.at[where].set(new if axis == 1 else jnp.moveaxis(new, axis, 1), mode="drop")

    return map_arrays(put, cache, fresh)


def _write_one(cache: LatentCache, fresh: LatentCache) -> LatentCache:
    """One token of one sequence, in place; see `attention._write_one`."""
    position = fresh.positions[0, 0]
    slot = position % cache.positions.shape[1]

    def put(old: Array, axis: int, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis)

    return jax.lax.cond(position >= 0, lambda cache: map_arrays(put, cache, fresh), lambda cache: cache, cache)
