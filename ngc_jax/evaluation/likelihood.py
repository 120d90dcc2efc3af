"""Log-likelihood of tokens, without holding the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ngc_jax.models.decoder import Decoder
from ngc_jax.types import Params


def cross_entropy(logits: Float[Array, "... V"], targets: Array) -> Float[Array, ...]:
    """-log p(target) in nats.

    Args:
        logits: (..., V), float32.
        targets: (...) int32.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def divergence(
    teacher: Float[Array, "... V"], student: Float[Array, "... V"], *, temperature: float = 1.0, top_k: int = 0
) -> Float[Array, ...]:
    """t^2 KL(teacher || student) of the softmaxes of logits over t, in nats.

    Args:
        teacher: (..., V) logits, float32.
        student: (..., V).
        temperature: t.
        top_k: Over the teacher's top-k tokens and the mass of all others, which by the data-processing
            inequality is at most the divergence over the whole vocabulary; 0 for the latter.
    """
    teacher, student = teacher / temperature, student / temperature
    theirs = teacher - jax.nn.logsumexp(teacher, axis=-1, keepdims=True)
    ours = student - jax.nn.logsumexp(student, axis=-1, keepdims=True)
    if 0 < top_k < teacher.shape[-1]:
        top, index = jax.lax.top_k(theirs, top_k)
        theirs = jnp.concatenate([top, _rest(theirs, index)], axis=-1)
        ours = jnp.concatenate([jnp.take_along_axis(ours, index, axis=-1), _rest(ours, index)], axis=-1)
    return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1)


def _rest(log_probabilities: Array, index: Array) -> Array:
    """Log of the mass outside `index`, (..., 1); summed, because subtracting from 1 would cancel."""
    others = jnp.put_along_axis(log_probabilities, index, jnp.finfo(jnp.float32).min, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1, keepdims=True)


def scored_sums(
    decoder: Decoder,
    params: Params,
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    *,
    context: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Summed log-likelihood of each window after its first `context` tokens, which are not scored, and their number.

    Args:
        decoder: The model.
        params: Its parameters.
        tokens_BxL: Token ids.
        positions_BxL: Their positions; -1 marks padding.
        context: At least 1: the length of the prefix of each window, or 1 without one.
    """
    likelihoods, mask = token_log_likelihoods(decoder, params, tokens_BxL, positions_BxL)
    return likelihoods[:, context - 1 :].sum(axis=1), mask[:, context - 1 :].sum(axis=1)


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
    return hidden_log_likelihoods(decoder, params, hidden_BxLxD, tokens_BxL, positions_BxL, chunk=chunk)


def hidden_log_likelihoods(
    decoder: Decoder,
    params: Params,
    hidden_BxLxD: Float[Array, "B L D"],
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, "B L-1"], Float[Array, "B L-1"]]:
    """As `token_log_likelihoods`, from the final hidden states (normed); of the parameters only the unembedding's."""
    targets_BxL = tokens_BxL[:, 1:]
    mask_BxL = (positions_BxL[:, 1:] >= 0).astype(jnp.float32)

    score = partial(_log_likelihood, decoder, params)
    return in_chunks(score, hidden_BxLxD[:, :-1], targets_BxL, chunk=chunk) * mask_BxL, mask_BxL


def log_likelihood_gradient(
    decoder: Decoder,
    params: Params,
    hidden_BxLxD: Float[Array, "B L D"],
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, ""], Float[Array, "B L D"]]:
    """The sum of `hidden_log_likelihoods` and its gradient by the hidden states; logits are computed once."""
    mask_BxL = (positions_BxL[:, 1:] >= 0).astype(jnp.float32)
    score = partial(_log_likelihood, decoder, params)
    total, gradient = _sum_and_gradient(score, mask_BxL, hidden_BxLxD[:, :-1], tokens_BxL[:, 1:], chunk=chunk)
    return total, jnp.pad(gradient, ((0, 0), (0, 1), (0, 0)))


def sample_targets(
    decoder: Decoder,
    params: Params,
    hidden_BxLxD: Float[Array, "B L D"],
    tokens_BxL: Int[Array, "B L"],
    key: Key[Array, ""],
    *,
    chunk: int = 256,
) -> Int[Array, "B L"]:
    """The tokens, each but the first of a row replaced by a sample from the model's prediction for it."""
    batch, length = tokens_BxL.shape
    index_BxL = jnp.arange(batch * length).reshape(batch, length)

    def draw(hidden_BxcxD: Array, index_Bxc: Array) -> Array:
        keys = jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(index_Bxc)
        return jax.vmap(jax.vmap(jax.random.categorical))(keys, _logits(decoder, params, hidden_BxcxD))

    drawn = in_chunks(draw, hidden_BxLxD[:, :-1], index_BxL[:, :-1], chunk=chunk)
    return jnp.concatenate([tokens_BxL[:, :1], drawn.astype(tokens_BxL.dtype)], axis=1)


def hidden_divergences(
    decoder: Decoder,
    params: Params,
    hidden_BxLxD: Float[Array, "B L D"],
    teacher_BxLxD: Float[Array, "B L D"],
    positions_BxL: Int[Array, "B L"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """KL(teacher || student) of the next-token distributions at every token, in nats.

    Args:
        decoder: Its unembedding serves both.
        params: Of the parameters only the unembedding's.
        hidden_BxLxD: The student's final hidden states, normed.
        teacher_BxLxD: The teacher's.
        positions_BxL: Positions; -1 marks padding.
        chunk: Tokens of a row whose logits exist at once.

    Returns:
        Divergences (float32; 0 where padded) and the mask, 1 for a token.
    """
    mask_BxL = (positions_BxL >= 0).astype(jnp.float32)
    score = partial(_divergence, decoder, params)
    return in_chunks(score, hidden_BxLxD, teacher_BxLxD, chunk=chunk) * mask_BxL, mask_BxL


def divergence_gradient(
    decoder: Decoder,
    params: Params,
    hidden_BxLxD: Float[Array, "B L D"],
    teacher_BxLxD: Float[Array, "B L D"],
    positions_BxL: Int[Array, "B L"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, ""], Float[Array, "B L D"]]:
    """The sum of `hidden_divergences` and its gradient by the student's hidden states; logits are computed once."""
    mask_BxL = (positions_BxL >= 0).astype(jnp.float32)
    return _sum_and_gradient(partial(_divergence, decoder, params), mask_BxL, hidden_BxLxD, teacher_BxLxD, chunk=chunk)


def _log_likelihood(decoder: Decoder, params: Params, hidden_BxcxD: Array, targets_Bxc: Array) -> Array:
    return -cross_entropy(_logits(decoder, params, hidden_BxcxD), targets_Bxc)


def _divergence(decoder: Decoder, params: Params, hidden_BxcxD: Array, teacher_BxcxD: Array) -> Array:
    return divergence(_logits(decoder, params, teacher_BxcxD), _logits(decoder, params, hidden_BxcxD))


def _sum_and_gradient(
    score: Callable[..., Array], mask_BxL: Array, hidden_BxLxD: Array, *others: Array, chunk: int
) -> tuple[Array, Array]:
    """The sum of masked scores and its gradient by the hidden states, each chunk's while its logits exist."""

    def both(mask_Bxc: Array, hidden_BxcxD: Array, *others: Array) -> tuple[Array, Array]:
        scores_Bxc, pull = jax.vjp(lambda hidden: score(hidden, *others) * mask_Bxc, hidden_BxcxD)
        return scores_Bxc, pull(jnp.ones_like(scores_Bxc))[0]

    scores_BxL, gradient_BxLxD = in_chunks(both, mask_BxL, hidden_BxLxD, *others, chunk=chunk)
    return scores_BxL.sum(), gradient_BxLxD


def _logits(decoder: Decoder, params: Params, hidden: Array) -> Array:
    return decoder.bind({"params": params}).logits(hidden)


def in_chunks(score: Callable[..., Any], *arrays: Array, chunk: int) -> Any:
    """Map `score` over chunks of the length axis (the second), without keeping logits for the backward pass.

    Args:
        score: From chunks (B, c, ...) of the arrays to one array (B, c, ...), or a pytree of such.
        *arrays: (B, L, ...).
        chunk: c.

    Returns:
        As `score`, with L in place of c.
    """
    batch, length = arrays[0].shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    pad = count * chunk - length

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    scores = jax.lax.map(jax.checkpoint(lambda piece: score(*piece)), tuple(pieces(x) for x in arrays))
    return jax.tree.map(
        lambda each: jnp.moveaxis(each, 0, 1).reshape(batch, count * chunk, *each.shape[3:])[:, :length], scores
    )
