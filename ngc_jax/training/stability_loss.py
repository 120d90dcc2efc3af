"""Distance of a student's finite-time Lyapunov spectrum along depth from its teacher's, as a loss.

For a token t, K perturbations of its residual stream pass through the layers as in `ngc_jax.stability.depth`: the keys
and values of all other tokens are held constant, an orthonormal frame is pushed forward by every layer's Jacobian and
orthonormalised again, and layer l has the local rates, relative to the stream (the layers read it through norms),

    r_lk = log R_kk - log(|x_(l+1)| / |x_l|)                       (natural logarithms per layer)

Student and teacher begin with the same random frame; each then follows its own. The loss of a token is

    (1 / (n K)) · sum over layers l and directions k of (r_lk of the student - r_lk of the teacher)²

in squared rates per layer. Every row of a batch has the loss of m of its tokens, drawn in proportion to their weights,
times the sum of the weights: an unbiased estimate of the weighted sum over all of them. A document's first token is
excluded, as in a prompt's metric: it has no context.

The random draws depend on the key alone and are the same for every row, so that the value does not depend on how a
batch is split or sharded. Streams, keys and values are those of the step's own forward passes, and gradients flow
through them too. In addition a row costs m tokens of a forward pass and m · K forward derivatives for the teacher, and
the same with its backward pass for the student: with 8 tokens and 4 directions of 512 tokens a twelfth of the step.

Legend: B rows, L tokens, m chosen tokens, D embed, n layers times iterations (the depth), K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.models.attention import Cache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import depth_of, embed, layer_of
from ngc_jax.stability.flat import working_type
from ngc_jax.stability.lyapunov import RESOLUTION
from ngc_jax.stability.streams import log_length, widened
from ngc_jax.types import Params

Batch = Mapping[str, Array]


class Pass(NamedTuple):
    """A decoder and the results of its forward pass over a batch.

    Attributes:
        decoder: The module.
        params: Its parameters.
        streams: n residual streams (B, L, D), after every layer.
        cache: Keys and values of every layer, slot t being token t's.
    """

    decoder: Decoder
    params: Params
    streams: Sequence[Float[Array, "B L D"]]
    cache: Cache


def stability_sum(
    student: Pass,
    teacher: Pass,
    batch: Batch,
    weights_BxL: Float[Array, "B L"],
    *,
    key: PRNGKeyArray,
    directions: int = 4,
    tokens: int = 8,
) -> Float[Array, ""]:
    """The loss above, summed over a batch.

    Args:
        student: Gradients flow into its parameters, streams and cache.
        teacher: Of the same width and depth; the caller must stop gradients that are not wanted.
        batch: tokens, positions (-1 padding) and starts, each (B, L); see `packing`.
        weights_BxL: Of every token in the sum.
        key: For tokens and directions; fold the step into it.
        directions: K.
        tokens: m.

    Raises:
        UsageError: If the two differ in width or depth, or there are more directions than dimensions.
    """
    sizes = [(depth_of(one.decoder), one.decoder.config.embed_dim) for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the student has {sizes[0][0]} layers of width {sizes[0][1]}, the teacher {sizes[1][0]} of {sizes[1][1]}; "
            "spectra are compared layer by layer: expected the same sizes, or no weight of stability"
        )
    width = sizes[0][1]
    if directions > width:
        raise UsageError(f"{directions} directions in a stream of {width} dimensions; expected no more than that")
    of_tokens, of_frame = jax.random.split(key)
    own_BxL = jnp.where(batch["positions"] > batch["starts"], weights_BxL, 0.0)
    index_Bxm = draw_tokens(of_tokens, own_BxL, tokens)
    dtype = working_type(student.decoder.compute_dtype)
    frame_mxDxK, _ = gram_schmidt(jax.random.normal(of_frame, (tokens, width, directions), dtype))
    ours, theirs = (local_rates(one, batch, index_Bxm, frame_mxDxK) for one in (student, teacher))
    known = jnp.isfinite(ours) & jnp.isfinite(theirs)  # a lost direction has no rate
    gap = jnp.where(known, ours, 0.0) - jnp.where(known, theirs, 0.0)
    of_row_B = jnp.mean(jnp.square(gap), axis=(1, 2, 3))
    total_B = jnp.sum(own_BxL, axis=1)
    return jnp.sum(jnp.where(total_B > 0, of_row_B * total_B, 0.0))


def draw_tokens(key: PRNGKeyArray, weights_BxL: Float[Array, "B L"], count: int) -> Int[Array, "B m"]:
    """Draw tokens of every row in proportion to their weights, at equal distances in the cumulative weight.

    A token of weight w is drawn count · w / (sum of the row's) times on average (systematic sampling, Madow 1949), and
    one of weight 0 never unless all are 0. All rows share one random number.

    Args:
        key: Randomness.
        weights_BxL: At least 0.
        count: m; a token may be drawn several times.

    Returns:
        (B, m) indices in the row, ascending.
    """
    # Above 0 and up to 1: the value 0 would select a first token without weight.
    place_m = (jnp.arange(count) + 1.0 - jax.random.uniform(key)) / count
    sums_BxL = jnp.cumsum(weights_BxL, axis=1)
    return jax.vmap(lambda sums_L: jnp.searchsorted(sums_L, place_m * sums_L[-1]))(sums_BxL).astype(jnp.int32)


def local_rates(
    one: Pass, batch: Batch, index_Bxm: Int[Array, "B m"], frame_mxDxK: Float[Array, "m D K"]
) -> Float[Array, "B m n K"]:
    """Local rates of chosen tokens, relative to the stream; minus infinity where a direction was lost.

    Args:
        one: The decoder and its pass over the batch.
        batch: tokens, positions and starts.
        index_Bxm: The chosen tokens of every row.
        frame_mxDxK: The initial frame of each, with orthonormal columns.
    """
    decoder = one.decoder

    def chosen(values: Array) -> Array:
        return jax.vmap(lambda row, index: row[index])(values, index_Bxm)

    tokens_Bxm, positions_Bxm, starts_Bxm = (chosen(batch[name]) for name in ("tokens", "positions", "starts"))
    x_BxmxD = embed(decoder, one.params, tokens_Bxm, positions_Bxm, starts_Bxm)
    frame = jnp.broadcast_to(frame_mxDxK, (*index_Bxm.shape, *frame_mxDxK.shape[1:]))
    rates = []
    for number in range(depth_of(decoder)):
        advance = _layer(one, number, positions_Bxm, starts_Bxm)
        step = partial(_step, advance)
        frame, rates_BxmxK = (jax.checkpoint(step) if decoder.remat else step)(x_BxmxD, frame)
        rates.append(rates_BxmxK)
        x_BxmxD = chosen(one.streams[number])
    return jnp.stack(rates, axis=2)


def _step(advance: Callable[[Array], Array], x_BxmxD: Array, frame_BxmxDxK: Array) -> tuple[Array, Array]:
    y_BxmxD, push = jax.linearize(advance, x_BxmxD)
    pushed_BxmxDxK = widened(jax.vmap(push, -1, -1)(frame_BxmxDxK.astype(x_BxmxD.dtype)))
    frame_BxmxDxK, growth_BxmxK = gram_schmidt(pushed_BxmxDxK)
    return frame_BxmxDxK, growth_BxmxK - (log_length(y_BxmxD) - log_length(x_BxmxD))[..., None]


def gram_schmidt(vectors: Float[Array, "*batch D K"]) -> tuple[Float[Array, "*batch D K"], Float[Array, "*batch K"]]:
    """As `lyapunov.orthonormalise`, for a batch, and without LAPACK.

    For a few directions it is as accurate, runs on the devices that hold the rows, and has derivatives of plain sums.
    (With jaxlib 0.10.2, a step that has a batched QR of every layer and its derivative hung on a CPU of one device.)

    Returns:
        Orthonormal frames, and log R_kk; minus infinity, and a column of 0, where a direction was lost.
    """
    columns: list[Array] = []
    growth: list[Array] = []
    resolution = RESOLUTION * float(jnp.finfo(vectors.dtype).eps)
    for k in range(vectors.shape[-1]):
        left = vectors[..., k]
        shortest = resolution**2 * jnp.sum(jnp.square(left), axis=-1)
        for column in columns:
            left = left - column * jnp.sum(column * left, axis=-1, keepdims=True)
        square = jnp.sum(jnp.square(left), axis=-1)
        lost = square <= shortest
        square = jnp.where(lost, 1.0, square)
        growth.append(jnp.where(lost, -jnp.inf, 0.5 * jnp.log(square)))
        columns.append(jnp.where(lost[..., None], 0.0, left * jax.lax.rsqrt(square)[..., None]))
    return jnp.stack(columns, axis=-1), jnp.stack(growth, axis=-1)


def _layer(one: Pass, number: int, positions_Bxm: Array, starts_Bxm: Array) -> Callable[[Array], Array]:
    """A layer as a map of chosen tokens, each separately."""
    layer = layer_of(one.decoder, one.params, number, hold_others=True)
    return lambda x_BxmxD: layer(x_BxmxD, positions_Bxm, one.cache[number], starts_Bxm)[0]
