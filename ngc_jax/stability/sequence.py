"""Stability along the sequence: propagation of a perturbation of past activations to those of later tokens.

A decoder's memory of a text is its cache. The iterated map takes the cache at token t to the cache at token t+1, with
the text given; a perturbation of remembered keys and values enters those of the new token through attention. Two
properties of this map determine what can be measured:

- A cache forgets nothing, so that a perturbation of it could never decay; the question is whether it is passed on. The
  state is therefore the keys and values of the last M tokens in all layers, each layer's in units of their own root
  mean square, and perturbations of older tokens are dropped.
- A layer's keys and values depend on those of lower layers only. From token to token a perturbation rises by at least
  one layer, and after n tokens it is gone: in the limit of long texts every exponent is minus infinity. Rates are
  therefore finite-time rates of segments of M tokens, each with a random perturbation of the M tokens before.

The neuronal stability metric of a segment is the rate at which a perturbation of random direction grows over it,

    metric = (1/M) · log sqrt(mean over random unit q of |J q|²)

with J the Jacobian of M tokens: a perturbation of M tokens is multiplied by exp(M · metric) in the next M tokens.
Below 0 it decays. `depth.py` has the same metric along depth. The definitions are ours, see docs/stability.md.

Legend: B prompts, L tokens with padding, n layers times iterations, K directions, M memory, T segments, S cache slots,
P sources, D embed.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.models.attention import Cache, LayerCache, init_cache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import depth_of, embed
from ngc_jax.stability.flat import working_type
from ngc_jax.stability.lyapunov import orthonormalise
from ngc_jax.stability.streams import (
    apply_layer,
    check_prompts,
    jit_on_prompts,
    log_length,
    record,
    widened,
    without_padding,
)
from ngc_jax.types import Params

# Of every layer: keys and values, without positions, which are not perturbed.
KeysValues = tuple[tuple[Array, Array], ...]


class SequenceStability(NamedTuple):
    """Rates are natural logarithms per token; NaN for segments that reach into padding.

    Attributes:
        metric: (B,) the neuronal stability metric of the text: the mean of its segments'.
        error: (B,) its standard error, from the spread of the segments; NaN for a single one.
        segments: (B, T) the metric of every segment.
        exponents: (B, T, K) finite-time Lyapunov exponents of every segment. They depend on the frame.
        growth: (B, T, M) logarithm of the size of the random perturbation after every token of a segment; it starts at
            0. The segment's metric is the last one divided by M.
        layers: (B, T, n) share of its squared size in each layer at the segment's end.
        ends: (T,) position of the last token of every segment.
    """

    metric: Float[Array, " B"]
    error: Float[Array, " B"]
    segments: Float[Array, "B T"]
    exponents: Float[Array, "B T K"]
    growth: Float[Array, "B T M"]
    layers: Float[Array, "B T n"]
    ends: Int[Array, " T"]


@jit_on_prompts("directions", "memory")
def sequence_stability(
    decoder: Decoder,
    params: Params,
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"] | None = None,
    *,
    key: PRNGKeyArray,
    directions: int = 8,
    memory: int = 32,
) -> SequenceStability:
    """Exponents and metric along some texts, measured from token M on.

    Prompts are processed one after the other, token by token with a cache; in addition to the model, memory is that of
    K + 1 caches.

    Args:
        decoder: The module, dense or compact; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        tokens_BxL: Prompts, padded on the right with any token; or one of (L,), or a list of any lengths.
        lengths_B: Number of tokens in each prompt, without padding; all if None.
        key: For the directions, which depend on it and on the segment only.
        directions: K.
        memory: M, number of tokens that a perturbation is remembered and followed.

    Raises:
        UsageError: If the tokens are not a batch of the model's ids, the lengths do not fit, or
            the rows are shorter than two memories.

    Example:
        >>> given = model.decoder, model.params, tokens[None, :12]
        >>> found = sequence_stability(*given, key=jax.random.key(0), directions=2, memory=4)
        >>> found.segments.shape  # two segments of four tokens, after the first four
        (1, 2)
    """
    lengths_B = check_prompts(decoder, tokens_BxL, lengths_B)
    length = tokens_BxL.shape[1]
    if min(memory, directions) < 1 or length < 2 * memory:
        raise UsageError(
            f"rows of {length} tokens, a memory of {memory} and {directions} directions; expected at least 1 of each "
            "and rows of two memories: use longer prompts or a shorter memory"
        )

    def one(row: tuple[Array, Array]) -> SequenceStability:
        return _of_prompt(decoder, params, *row, key, directions, memory)

    result = jax.lax.map(one, (tokens_BxL, lengths_B))
    return result._replace(ends=result.ends[0])


def _of_prompt(
    decoder: Decoder, params: Params, tokens_L: Array, length: Array, key: PRNGKeyArray, directions: int, memory: int
) -> SequenceStability:
    variables = {"params": params}
    index_L = jnp.arange(len(tokens_L), dtype=jnp.int32)
    positions_L = jnp.where(index_L < length, index_L, -1)
    units = _units(decoder, params, tokens_L, positions_L)

    def run(cache: Cache, tokens: Array, positions: Array) -> Cache:
        _, after = cast(Any, decoder.apply(variables, tokens[None], positions[None], cache, method="hidden"))
        return after

    def advance(carry: tuple[Cache, KeysValues], one: tuple[Array, ...]) -> tuple[tuple[Cache, KeysValues], Array]:
        """One token: the cache, and its perturbations in units."""
        (cache, vectors), (token, position) = carry, one

        def new_cache(kv: KeysValues) -> tuple[KeysValues, Cache]:
            after = run(_with(cache, kv), token[None], position[None])
            return _without_positions(after), after

        kv = _without_positions(cache)
        _, push, after = jax.linearize(new_cache, kv, has_aux=True)

        def push_in_units(vector: KeysValues) -> KeysValues:
            tangent = jax.tree.map(lambda v, unit, x: (v * unit).astype(x.dtype), vector, units, kv)
            return jax.tree.map(lambda v, unit: widened(v) / unit, push(tangent), units)

        vectors = _recent(jax.vmap(push_in_units, -1, -1)(vectors), after, memory)
        return (after, vectors), 0.5 * jnp.log(sum(map(_squares, vectors)) / directions)

    def segment(cache: Cache, given: tuple[Array, tuple[Array, ...]]) -> tuple[Cache, tuple[Array, Array, Array]]:
        number, tokens_M = given
        noise = _noise(jax.random.fold_in(key, number), cache, directions)
        frame, _ = _orthonormal(_recent(noise, cache, memory))
        (cache, vectors), growth_M = jax.lax.scan(advance, (cache, frame), tokens_M)
        squares_n = jnp.stack([_squares(layer) for layer in vectors])
        return cache, (_orthonormal(vectors)[1] / memory, growth_M, squares_n / jnp.sum(squares_n))

    cache = init_cache(decoder.config, 1, len(tokens_L), decoder.compute_dtype)
    cache = run(cache, tokens_L[:memory], positions_L[:memory])
    count = len(tokens_L) // memory - 1
    measured = tuple(x[memory : (count + 1) * memory].reshape(count, memory) for x in (tokens_L, positions_L))
    _, found = jax.lax.scan(segment, cache, (jnp.arange(count), measured))

    ends_T = memory * jnp.arange(2, count + 2) - 1
    own_T = ends_T < length
    exponents_TxK, growth_TxM, layers_Txn = without_padding(found, jnp.where(own_T, ends_T, -1), jnp.nan)
    segments_T = growth_TxM[:, -1] / memory
    error = jnp.nanstd(segments_T, ddof=1) / jnp.sqrt(jnp.sum(own_T))
    return SequenceStability(jnp.nanmean(segments_T), error, segments_T, exponents_TxK, growth_TxM, layers_Txn, ends_T)


def _units(decoder: Decoder, params: Params, tokens_L: Array, positions_L: Array) -> Any:
    """Root mean square of every layer's keys and values over the text, like `KeysValues`."""
    own = positions_L >= 0
    length = jnp.sum(own)

    def unit(x: Array, own: Array) -> Array:
        squares = jnp.where(own, jnp.square(widened(x)), 0)
        return jnp.sqrt(jnp.sum(squares) / (length * x.size / own.size))

    cache = record(decoder, params, tokens_L, length).cache
    return tuple(
        (unit(layer.keys, own[None, None, None]), unit(layer.values, own[None, None, :, None])) for layer in cache
    )


def _without_positions(cache: Cache) -> KeysValues:
    return tuple((layer.keys, layer.values) for layer in cache)


def _with(cache: Cache, kv: KeysValues) -> Cache:
    return tuple(LayerCache(*both, layer.positions) for layer, both in zip(cache, kv, strict=True))


def _noise(key: PRNGKeyArray, cache: Cache, directions: int) -> KeysValues:
    """Random vectors of a cache, in a last axis; a slot's depend on the key, its layer and its number only."""

    def numbers(key: PRNGKeyArray, slots: int, others: tuple[int, ...], dtype: Any) -> Array:
        keys_S = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(jnp.arange(slots))
        return jax.vmap(lambda key: jax.random.normal(key, (*others, directions), working_type(dtype)))(keys_S)

    vectors = []
    for layer_key, layer in zip(jax.random.split(key, len(cache)), cache, strict=True):
        of_keys, of_values = jax.random.split(layer_key)
        _, heads, head_dim, slots = layer.keys.shape
        noise = [numbers(one, slots, (heads, head_dim), layer.keys.dtype) for one in (of_keys, of_values)]
        vectors.append((jnp.moveaxis(noise[0], 0, 2)[None], jnp.moveaxis(noise[1], 0, 1)[None]))
    return tuple(vectors)


def _recent(vectors: KeysValues, cache: Cache, memory: int) -> KeysValues:
    """Perturbations (last axis) of the newest `memory` tokens; those of older tokens and of empty slots become 0."""
    kept = []
    for (keys, values), layer in zip(vectors, cache, strict=True):
        positions_S = layer.positions[0]
        recent_S = (positions_S >= 0) & (positions_S > positions_S.max() - memory)
        kept.append((jnp.where(recent_S[:, None], keys, 0), jnp.where(recent_S[:, None, None], values, 0)))
    return tuple(kept)


def _orthonormal(vectors: KeysValues) -> tuple[KeysValues, Float[Array, " K"]]:
    """QR of perturbations (last axis): the frame and log |R_ii|."""
    leaves, structure = jax.tree.flatten(vectors)
    K = leaves[0].shape[-1]
    frame_NxK, growth_K = orthonormalise(jnp.concatenate([leaf.reshape(-1, K) for leaf in leaves]))
    ends = list(itertools.accumulate(leaf.size // K for leaf in leaves))
    parts = jnp.split(frame_NxK, ends[:-1])
    frame = jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
    return frame, growth_K


def _squares(layer: tuple[Array, Array]) -> Array:
    return jnp.sum(jnp.square(layer[0])) + jnp.sum(jnp.square(layer[1]))


@jit_on_prompts()
def responses(
    decoder: Decoder,
    params: Params,
    tokens_L: Int[Array, " L"],
    sources_P: Int[Array, " P"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, "P m L"]:
    """Response of later tokens to a perturbation of one token's embedding, layer by layer.

    Args:
        decoder: The module; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        tokens_L: A text without padding.
        sources_P: Positions of the perturbed tokens; each is perturbed separately, in one random direction.
        key: For the directions.

    Returns:
        (P, n+1, L): |perturbation of x_l[t]| / |x_l[t]| relative to its value at the source for l = 0. 1 there, 0 for
        tokens before the source. Costs one forward derivative for each source.

    Raises:
        UsageError: If the tokens are not one text of the model's ids.
    """
    check_prompts(decoder, tokens_L[None], None)
    x_LxD = embed(decoder, params, tokens_L)
    positions_L = jnp.arange(len(tokens_L), dtype=jnp.int32)

    def streams(x_LxD: Array) -> list[Array]:
        found = [x_LxD]
        for number in range(depth_of(decoder)):
            found.append(apply_layer(decoder, params, number, found[-1], positions_L)[0])
        return found

    lengths_mxL = jnp.stack([log_length(x) for x in streams(x_LxD)])

    def one(source: tuple[Array, Array]) -> Array:
        position, key = source
        direction_D = jax.random.normal(key, x_LxD.shape[1:], working_type(x_LxD))
        direction_D *= jnp.exp(lengths_mxL[0, position]) / jnp.linalg.norm(direction_D)
        tangent_LxD = jnp.zeros_like(x_LxD).at[position].set(direction_D.astype(x_LxD.dtype))
        pushed = jax.jvp(streams, (x_LxD,), (tangent_LxD,))[1]
        return jnp.stack([jnp.linalg.norm(widened(v), axis=-1) for v in pushed]) * jnp.exp(-lengths_mxL)

    return jax.lax.map(one, (sources_P, jax.random.split(key, len(sources_P))))
