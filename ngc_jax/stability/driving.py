"""A language model as a driven dynamics along depth: recorded streams, the maps of its layers, and the potential.

The state of token t after l layers is its residual stream x_l[t]; layer l takes it to x_(l+1)[t]. The other tokens
drive it through attention: the potential is its actual motion minus that of an undriven reference. Two references:

- alone: the same layer at the same state, with attention restricted to the token itself. The potential is the effect of
  the prompt on the token's motion; it is 0 for the first token, which has no context.
- mean field: the mean step of the tokens of a reference text. The potential is what distinguishes this token.

Both are our definitions; see docs/stability.md.

Legend: B prompts, L tokens with padding, D embed, n layers times iterations (the depth), K directions.
Prompts are padded on the right; their tokens have the positions 0, 1, 2, ...
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.errors import UsageError
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import depth_of
from ngc_jax.stability.potential import Drive, potential_against, potential_along, share_in_span
from ngc_jax.stability.streams import (
    apply_layer,
    check_prompts,
    jit_on_prompts,
    record,
    widened,
    without_padding,
)
from ngc_jax.types import Params


@jit_on_prompts()
def potential_over_alone(
    decoder: Decoder, params: Params, tokens_BxL: Int[Array, "B L"], lengths_B: Int[Array, " B"] | None = None
) -> Drive:
    """The potential that the prompt exerts on every token: actual motion minus that of the token alone.

    The reference moves from the actual x_l[t], by layer l with attention to itself only: as if the token were alone at
    position 0 of its own context (rotary embeddings depend on distances only; a learned position is in x_0[t]). Costs
    one more forward pass.

    Args:
        decoder: The module; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        tokens_BxL: Prompts, padded on the right with any token; or one of (L,), or a list of any lengths.
        lengths_B: Number of tokens in each prompt, without padding; all if None.

    Returns:
        `Drive` with leading axes (B, L, n): potential and undriven motion (B, L, n, D) per layer. 0 at padding.

    Raises:
        UsageError: If the tokens are not a batch of the model's ids, or the lengths do not fit.
    """
    lengths_B = check_prompts(decoder, tokens_BxL, lengths_B)

    def one(row: tuple[Array, Array]) -> Drive:
        recording = record(decoder, params, *row)
        streams_mxLxD, positions_L = recording.streams, recording.positions
        after_nxLxD = jnp.stack(
            [
                apply_layer(decoder, params, number, streams_mxLxD[number], positions_L, alone=True)[0]
                for number in range(depth_of(decoder))
            ]
        )

        def token(stream_mxD: Array, after_nxD: Array) -> Drive:
            return potential_along(stream_mxD, lambda _, after_D: after_D, inputs=after_nxD)

        drive = jax.vmap(token, (1, 1))(widened(streams_mxLxD), widened(after_nxLxD))
        return without_padding(drive, positions_L, 0)

    return jax.lax.map(one, (tokens_BxL, lengths_B))


@jit_on_prompts()
def mean_motion(
    decoder: Decoder, params: Params, tokens_BxL: Int[Array, "B L"], lengths_B: Int[Array, " B"] | None = None
) -> Float[Array, "n D"]:
    """The mean-field reference: every layer's step x_(l+1)[t] - x_l[t], averaged over all tokens of a text.

    Args:
        decoder: The module; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        tokens_BxL: Windows of the reference text, padded on the right with any token.
        lengths_B: Number of tokens in each window, without padding; all if None.

    Raises:
        UsageError: As `potential_over_alone`.
    """
    lengths_B = check_prompts(decoder, tokens_BxL, lengths_B)

    def total(row: tuple[Array, Array]) -> Array:
        recording = record(decoder, params, *row)
        steps_nxLxD = jnp.diff(widened(recording.streams), axis=0)
        return jnp.sum(jnp.where(recording.positions[:, None] >= 0, steps_nxLxD, 0), axis=1)

    return jnp.sum(jax.lax.map(total, (tokens_BxL, lengths_B)), axis=0) / jnp.sum(lengths_B)


@jit_on_prompts()
def potential_over_mean(
    decoder: Decoder,
    params: Params,
    motion_nxD: Float[Array, "n D"],
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"] | None = None,
) -> Drive:
    """The potential of every token over the mean field: its actual step minus the mean step of a reference text.

    Args:
        decoder: The module; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        motion_nxD: From `mean_motion`.
        tokens_BxL: Prompts, padded on the right with any token; or one of (L,), or a list of any lengths.
        lengths_B: Number of tokens in each prompt, without padding; all if None.

    Returns:
        As `potential_over_alone`.

    Raises:
        UsageError: As `potential_over_alone`, and if the motion is not that of a model of this size.
    """
    lengths_B = check_prompts(decoder, tokens_BxL, lengths_B)
    if motion_nxD.shape != (expected := (depth_of(decoder), decoder.config.embed_dim)):
        raise UsageError(f"a mean motion of shape {motion_nxD.shape}; expected {expected}: use mean_motion")
    reference_mxD = jnp.concatenate([jnp.zeros_like(motion_nxD[:1]), jnp.cumsum(motion_nxD, axis=0)])

    def one(row: tuple[Array, Array]) -> Drive:
        recording = record(decoder, params, *row)
        streams_mxLxD = widened(recording.streams)
        drive = jax.vmap(lambda stream_mxD: potential_against(stream_mxD, reference_mxD), 1)(streams_mxLxD)
        return without_padding(drive, recording.positions, 0)

    return jax.lax.map(one, (tokens_BxL, lengths_B))


@jax.jit
def alignment(drive: Drive, frames_BxLxnxDxK: Float[Array, "B L n D K"]) -> Float[Array, "B L n K"]:
    """The share of |u|² in the directions that depth has expanded most, for every token and layer.

    Args:
        drive: From this module's functions.
        frames_BxLxnxDxK: From `depth.depth_stability(..., keep_frames=True)`.

    Returns:
        Entry k: the share in the first k + 1 directions; the rest lies in the more contracting ones. A direction
        independent of the frames has (k + 1) / D.
    """
    return jax.vmap(jax.vmap(share_in_span))(drive.potential, frames_BxLxnxDxK)
