"""A key-value cache that keeps the signals of groups in place of the keys and values that are read from them.

Keys and values of a group are linear in its signal, an r-dimensional message per token. Where r is smaller than what it
replaces, the signal is kept. The result is the same up to rounding:

- Keys are computed from the signals at every step: output states, bias, norm, rotary embedding.
- Values are not computed at all. A weighted sum of values is the same sum of signals, read by the output states once,
  plus the bias, since the weights of a query sum to 1.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps a latent vector in the same way, but
trains a separate rotary part, which is not needed where keys are computed again.

Legend: B batch, L query tokens, S key tokens (cache slots), N query heads, K key-value heads, G query heads of one
key-value head, H head dimensions, R signal width.
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
from ngc_jax.models.attention import LayerCache, attend, rotate, to_ring
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.rope import Rope

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

        held = _map(padded, cache)
        empty = jnp.arange(slots) >= length
        return held._replace(positions=jnp.where(empty, -1, held.positions))
    # The newest position with the slot as remainder.
    newest_Bx1 = cache.positions.max(axis=1, keepdims=True)
    position_BxS = newest_Bx1 - (newest_Bx1 - jnp.arange(slots)) % slots
    index_BxS = jnp.maximum(position_BxS, 0)

    def taken(x: Array, axis: int) -> Array:
        others = [dimension for dimension in range(1, x.ndim) if dimension != axis]
        return jnp.take_along_axis(x, jnp.expand_dims(index_BxS, others), axis=axis)

    return _map(taken, cache)._replace(positions=jnp.maximum(position_BxS, -1))


def _map(function: Callable[..., Array], cache: LatentCache, *others: LatentCache) -> LatentCache:
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
    fresh = _map(lambda old, axis, new: new.astype(old.dtype), cache, fresh)
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

    return _map(put, cache, fresh)


def _write_one(cache: LatentCache, fresh: LatentCache) -> LatentCache:
    """One token of one sequence, in place; see `attention._write_one`."""
    position = fresh.positions[0, 0]
    slot = position % cache.positions.shape[1]

    def put(old: Array, axis: int, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis)

    return jax.lax.cond(position >= 0, lambda cache: _map(put, cache, fresh), lambda cache: cache, cache)


class Readers(NamedTuple):
    """How keys and values of a layer are read from signals.

    Attributes:
        signals: The new tokens' (B, L, R), in the order of the cache.
        keys: From signals (B, S, R) to keys (B, S, K, H), bias and norm included, rotary embedding not; None where the
            cache keeps keys.
        values: The output states of the values (K, H, R); None where the cache keeps values.
        value_bias: (K, H); None without a bias.
    """

    signals: tuple[Float[Array, "B L R"], ...]
    keys: Callable[[Float[Array, "B S R"]], Float[Array, "B S K H"]] | None
    values: Float[Array, "K H R"] | None
    value_bias: Float[Array, "K H"] | None


class AttentionRules(NamedTuple):
    """What does not depend on the tokens.

    Attributes:
        rope: The rotary embedding; None for none.
        scale: Multiplies the logits.
        window: How many tokens a query sees, itself included; None for all before it.
        soft_cap: Bounds the logits to (-soft_cap, soft_cap) by tanh; None for no bound.
    """

    rope: Rope | None
    scale: float
    window: int | None = None
    soft_cap: float | None = None


def attend_in_latent_space(
    qkv: tuple[Float[Array, "B L N H"], Float[Array, "B L K H"], Float[Array, "B L K H"]],
    cache: LatentCache,
    readers: Readers,
    positions_BxL: Int[Array, "B L"],
    starts_BxL: Int[Array, "B L"] | None,
    rules: AttentionRules,
) -> tuple[Float[Array, "B L N H"], LatentCache]:
    """Causal attention of new tokens to a cache that keeps signals; equal to `attend` after `extend`.

    Args:
        qkv: Queries, keys and values of the new tokens, without rotary embedding.
        cache: The layer's cache; without slots, it becomes the tokens in order.
        readers: How keys and values are read from signals.
        positions_BxL: Positions of the new tokens; -1 for padding.
        starts_BxL: Lowest position that each query sees; None for 0.
        rules: Of the layer.

    Returns:
        The output and the new cache.
    """
    q, k, v = qkv
    rotated = rotate(k, positions_BxL, rules.rope)
    own = LayerCache(rotated.transpose(0, 2, 3, 1), v.swapaxes(1, 2), positions_BxL)
    fresh = LatentCache(
        None if cache.keys is None else own.keys,
        None if cache.values is None else own.values,
        readers.signals,
        positions_BxL,
    )
    attend_all = partial(attend, scale=rules.scale, window=rules.window, soft_cap=rules.soft_cap)
    if cache.positions.shape[1] == 0:
        fresh = _map(lambda old, axis, new: new.astype(old.dtype), cache, fresh)
        return attend_all(rotate(q, positions_BxL, rules.rope), own, positions_BxL, starts_BxL), fresh
    written = write(cache, fresh)
    if positions_BxL.shape[1] == 1:
        return _attend_one(q, written, readers, positions_BxL, starts_BxL, rules), written
    # As in `attention.extend`: several tokens attend to the old cache and to themselves.
    before = rebuilt(cache, readers, rules.rope)
    both = LayerCache(
        jnp.concatenate([before.keys, own.keys.astype(before.keys.dtype)], axis=3),
        jnp.concatenate([before.values, own.values.astype(before.values.dtype)], axis=2),
        jnp.concatenate([before.positions, positions_BxL], axis=1),
    )
    return attend_all(rotate(q, positions_BxL, rules.rope), both, positions_BxL, starts_BxL), written


def rebuilt(cache: LatentCache, readers: Readers, rope: Rope | None) -> LayerCache:
    """The keys and values of all slots.

    Args:
        cache: The layer's cache.
        readers: How they are read from its signals.
        rope: The rotary embedding.
    """
    keys, values = cache.keys, cache.values
    if keys is None:
        assert readers.keys is not None
        keys = rotate(readers.keys(cache.signals[0]), cache.positions, rope).transpose(0, 2, 3, 1)
    if values is None:
        assert readers.values is not None
        signal = cache.signals[-1]
        values = jnp.einsum("bsr,khr->bksh", signal, readers.values, preferred_element_type=jnp.float32)
        if readers.value_bias is not None:
            values += readers.value_bias[:, None]
        values = values.astype(signal.dtype)
    return LayerCache(keys, values, cache.positions)


def _attend_one(
    q_Bx1xNxH: Array,
    cache: LatentCache,
    readers: Readers,
    position_Bx1: Array,
    starts_Bx1: Array | None,
    rules: AttentionRules,
) -> Array:
    """One query of every sequence."""
    batch, _, heads, head_dim = q_Bx1xNxH.shape
    logits_BxKxGxS = _logits_of_one(q_Bx1xNxH, cache, readers, position_Bx1, rules.rope) * rules.scale
    if rules.soft_cap is not None:
        logits_BxKxGxS = rules.soft_cap * jnp.tanh(logits_BxKxGxS / rules.soft_cap)
    seen_BxS = (cache.positions >= 0) & (cache.positions <= position_Bx1)
    if starts_Bx1 is not None:
        seen_BxS &= cache.positions >= starts_Bx1
    if rules.window is not None:
        seen_BxS &= position_Bx1 - cache.positions < rules.window
    logits_BxKxGxS = jnp.where(seen_BxS[:, None, None], logits_BxKxGxS, jnp.finfo(jnp.float32).min)
    weights_BxKxGxS = jax.nn.softmax(logits_BxKxGxS, axis=-1)
    if cache.values is not None:
        weights = weights_BxKxGxS.astype(cache.values.dtype)
        out = jnp.einsum("bkgs,bksh->bkgh", weights, cache.values, preferred_element_type=jnp.float32)
    else:
        assert readers.values is not None
        signal_BxSxR = cache.signals[-1]
        weights = weights_BxKxGxS.reshape(batch, heads, -1).astype(signal_BxSxR.dtype)
        sums_BxNxR = jnp.einsum("bns,bsr->bnr", weights, signal_BxSxR, preferred_element_type=jnp.float32)
        sums = sums_BxNxR.reshape(*weights_BxKxGxS.shape[:3], -1)
        out = jnp.einsum("bkgr,khr->bkgh", sums, readers.values.astype(jnp.float32))
        if readers.value_bias is not None:
            out += readers.value_bias[:, None]
    return out.reshape(batch, 1, heads, head_dim).astype(q_Bx1xNxH.dtype)


def _logits_of_one(
    q_Bx1xNxH: Array, cache: LatentCache, readers: Readers, position_Bx1: Array, rope: Rope | None
) -> Array:
    """(B, K, G, S) in float32, without scale."""
    batch, _, heads, head_dim = q_Bx1xNxH.shape

    def rotated_query(at_Bx1: Array, kv_heads: int) -> Array:
        return rotate(q_Bx1xNxH, at_Bx1, rope).reshape(batch, kv_heads, heads // kv_heads, head_dim)

    def products(query_BxKxGxH: Array, spec: str, keys: Array) -> Array:
        return jnp.einsum(spec, query_BxKxGxH, keys, preferred_element_type=jnp.float32)

    if cache.keys is not None:
        return products(rotated_query(position_Bx1, cache.keys.shape[1]), "bkgh,bkhs->bkgs", cache.keys)
    assert readers.keys is not None
    slots = cache.positions.shape[1]
    # Keys are rotated by their slots, which is one table for all layers and steps. A key's position is its slot plus a
    # multiple of the number of slots, and only differences of positions matter: the query's rotation makes up for it.
    k_BxSxKxH = rotate(readers.keys(cache.signals[0]), jnp.arange(slots, dtype=jnp.int32)[None], rope)
    turn_Bx1 = position_Bx1 // slots
    within_Bx1 = position_Bx1 - turn_Bx1 * slots
    this, last = (
        products(rotated_query(within_Bx1 + back * slots, k_BxSxKxH.shape[2]), "bkgh,bskh->bkgs", k_BxSxKxH)
        for back in (0, 1)
    )
    return jnp.where((cache.positions // slots == turn_Bx1)[:, None, None], this, last)
