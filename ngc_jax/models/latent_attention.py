"""Attention to a `latent_cache.LatentCache`, whose keys and values are read from the signals that it keeps.

Legend: B batch, L query tokens, S key tokens (cache slots), N query heads, K key-value heads, G query heads of one
key-value head, H head dimensions, R signal width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.models.attention import LayerCache, attend, rotate
from ngc_jax.models.latent_cache import LatentCache, map_arrays, write
from ngc_jax.models.rope import Rope


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
        fresh = map_arrays(lambda old, axis, new: new.astype(old.dtype), cache, fresh)
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
