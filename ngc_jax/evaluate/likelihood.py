"""Log-likelihood of tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import Params


def token_log_likelihoods(
    decoder: Decoder,
    params: Params,
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, "B L-1"], Float[Array, "B L-1"]]:
    """Natural log-probability of every token but the first of each row, given those before it.

    Args:
        decoder: The model.
        params: Its parameters.
        tokens_BxL: Token ids.
        positions_BxL: Their positions; -1 marks padding.
        chunk: Tokens of a row whose logits exist at once; memory is B * chunk * V floats.

    Returns:
        Log-probabilities (float32; 0 where padded) and the mask, 1 for a scored token.
    """
    hidden_BxLxD, _ = decoder.apply({"params": params}, tokens_BxL, positions_BxL, method="hidden")
    hidden_BxLxD, targets_BxL = hidden_BxLxD[:, :-1], tokens_BxL[:, 1:]
    mask_BxL = (positions_BxL[:, 1:] >= 0).astype(jnp.float32)
    batch, length = targets_BxL.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    pad = count * chunk - length

    @jax.checkpoint
    def score(piece: tuple[Array, Array]) -> Array:
        hidden_BxcxD, targets_Bxc = piece
        logits_BxcxV = decoder.bind({"params": params}).logits(hidden_BxcxD)
        chosen = jnp.take_along_axis(logits_BxcxV, targets_Bxc[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits_BxcxV, axis=-1)

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    scores = jax.lax.map(score, (pieces(hidden_BxLxD), pieces(targets_BxL)))
    scores_BxL = jnp.moveaxis(scores, 0, 1).reshape(batch, -1)[:, :length]
    return scores_BxL * mask_BxL, mask_BxL
