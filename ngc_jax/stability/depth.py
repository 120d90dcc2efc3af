"""Stability along depth: growth of a perturbation of one token's residual stream through the layers.

The iterated map: layer l takes x_l[t] to x_(l+1)[t], with the keys and values of all other tokens held constant. Its
Jacobian is the diagonal block d x_(l+1)[t] / d x_l[t] of the whole sequence's. One pass gives it for all tokens, so
that K directions for every token cost K forward derivatives of one pass.

The **neuronal stability metric** of a token is the rate at which a small perturbation of random direction grows,
relative to the stream itself (the layers read the stream through norms, which remove its length):

    metric = (1/n) · ( log sqrt(mean over random unit q of |J q|²) - log(|x_n| / |x_0|) )

with J the Jacobian of all n layers. Below 0 perturbations decay: the token is stable. K random directions estimate the
mean, and their spread gives the uncertainty. Unlike exponents over so few steps, it does not depend on a frame: the
mean is |J|_F² / D. The paper names such a metric without a formula; this definition is ours, see docs/stability.md.

Legend: B prompts, L tokens with padding, D embed, n layers times iterations (the depth), K directions, S signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import encode
from ngc_jax.groups.plan import Plan
from ngc_jax.models.attention import init_cache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layers import input_site
from ngc_jax.models.layerwise import depth_of, embed, layer_of
from ngc_jax.stability.flat import working_type
from ngc_jax.stability.lyapunov import orthonormalise
from ngc_jax.stability.streams import (
    apply_layer,
    check_prompts,
    jit_on_prompts,
    log_length,
    widened,
    without_padding,
)
from ngc_jax.types import Params


class DepthStability(NamedTuple):
    """Rates are natural logarithms per layer; NaN at padding.

    Attributes:
        metric: (B, L) the neuronal stability metric.
        error: (B, L) its standard error, from the spread of the K directions; NaN if K is 1.
        exponents: (B, L, K) finite-time Lyapunov exponents, of the stream itself (not relative to its length). They
            depend on the frame: after few layers only their sum has a bound, the singular values of all layers.
        local: (B, L, n, K) growth rates of the layers, whose means are the exponents.
        growth: (B, L, n+1) logarithm of the factor by which a random perturbation has grown, relative to the stream,
            before every layer and after the last: 0 first, n · metric last.
        signals: For every group, (B, L): logarithm of the relative size of the random perturbation in the group's
            signal over that in the stream that enters its layers. Below 0 the group attenuates it. Without groups that
            read hidden neurons of experts.
        frames: (B, L, n, D, K) after every layer if requested, else None.
    """

    metric: Float[Array, "B L"]
    error: Float[Array, "B L"]
    exponents: Float[Array, "B L K"]
    local: Float[Array, "B L n K"]
    growth: Float[Array, "B L m"]
    signals: dict[str, Float[Array, "B L"]]
    frames: Float[Array, "B L n D K"] | None = None


@jit_on_prompts("directions", "keep_frames")
def depth_stability(
    decoder: Decoder,
    params: Params,
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"] | None = None,
    *,
    key: PRNGKeyArray,
    directions: int = 8,
    keep_frames: bool = False,
) -> DepthStability:
    """Exponents, metric and each group's contribution for every token of some prompts.

    Prompts are processed one after the other, layer by layer: in addition to the model, memory is that of one layer's
    forward derivatives, L · D · K numbers and attention's. The random directions of a token depend on the key and its
    position only, so that two models of the same size, or two prompts, are compared with the same ones.

    Args:
        decoder: The module, dense or compact; or a `LanguageModel`, without `params`, which also reads texts.
        params: Its parameters.
        tokens_BxL: Prompts, padded on the right with any token; or one of (L,), or a list of any lengths.
        lengths_B: Number of tokens in each prompt, without padding; all if None.
        key: For the directions.
        directions: K.
        keep_frames: Whether to return the frames: B · L · n · D · K numbers.

    Raises:
        UsageError: If the tokens are not a batch of the model's ids, the lengths do not fit, or
            there are more directions than dimensions.

    Example:
        >>> found = depth_stability(model, "Group", key=jax.random.key(0), directions=2)
        >>> found.metric.shape  # one number for each of five tokens; below 0 it is stable
        (1, 5)
    """
    lengths_B = check_prompts(decoder, tokens_BxL, lengths_B)
    embed_dim = decoder.config.embed_dim
    if not 1 <= directions <= embed_dim:
        raise UsageError(f"{directions} directions in a stream of {embed_dim} dimensions; expected 1 to {embed_dim}")
    index_L = jnp.arange(tokens_BxL.shape[1], dtype=jnp.int32)
    dtype = working_type(decoder.compute_dtype)

    def direction(position: Array) -> Array:
        return jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, position), (embed_dim, directions), dtype))[0]

    start_LxDxK = jax.lax.map(direction, index_L)

    def one(row: tuple[Array, Array]) -> DepthStability:
        tokens_L, length = row
        positions_L = jnp.where(index_L < length, index_L, -1)
        return without_padding(
            _of_prompt(decoder, params, tokens_L, positions_L, start_LxDxK, keep_frames), positions_L, jnp.nan
        )

    return jax.lax.map(one, (tokens_BxL, lengths_B))


def _of_prompt(
    decoder: Decoder, params: Params, tokens_L: Array, positions_L: Array, frame_LxDxK: Array, keep_frames: bool
) -> DepthStability:
    x_LxD = embed(decoder, params, tokens_L)
    depth, K = depth_of(decoder), frame_LxDxK.shape[-1]
    # A random perturbation is frame · mixing · exp(scale): the frame is orthonormal, the mixing of length sqrt(K).
    mixing_LxKxK = jnp.broadcast_to(jnp.eye(K, dtype=frame_LxDxK.dtype), (len(tokens_L), K, K))
    scale_L = jnp.zeros(len(tokens_L), frame_LxDxK.dtype)
    first_L = log_length(x_LxD)
    local, growth, frames = [], [scale_L], []
    signals: dict[str, list[Array]] = {}
    for number in range(depth):
        before_L = log_length(x_LxD)
        (x_LxD, read), push = jax.linearize(_layer(decoder, params, number, x_LxD, positions_L), x_LxD)
        columns_LxDxK = frame_LxDxK.astype(x_LxD.dtype)
        pushed_LxDxK, pushed_read = widened(jax.vmap(push, -1, -1)(columns_LxDxK))
        for name, signal_LxS in read.items():
            perturbed_LxSxK = jnp.einsum("lsk,lkj->lsj", pushed_read[name], mixing_LxKxK)
            gain_L = 0.5 * jnp.log(jnp.sum(perturbed_LxSxK**2, axis=(1, 2)) / K) - log_length(signal_LxS)
            signals.setdefault(name, []).append(gain_L + before_L)
        frame_LxDxK, rates_LxK = jax.vmap(orthonormalise)(pushed_LxDxK)
        mixing_LxKxK = jnp.einsum("ldj,ldk,lki->lji", frame_LxDxK, pushed_LxDxK, mixing_LxKxK)
        grown_L = jnp.sqrt(jnp.sum(mixing_LxKxK**2, axis=(1, 2)) / K)
        mixing_LxKxK, scale_L = mixing_LxKxK / grown_L[:, None, None], scale_L + jnp.log(grown_L)
        local.append(rates_LxK)
        growth.append(scale_L - log_length(x_LxD) + first_L)
        frames.append(frame_LxDxK)
    # The columns of the mixing are K independent samples of |J q|², each relative to their mean: their mean is 1.
    samples_LxK = jnp.sum(mixing_LxKxK**2, axis=1)
    error_L = jnp.std(samples_LxK, axis=1, ddof=1) / K**0.5 / (2 * depth) if K > 1 else jnp.full_like(scale_L, jnp.nan)
    local_LxnxK = jnp.stack(local, axis=1)
    return DepthStability(
        metric=growth[-1] / depth,
        error=error_L,
        exponents=jnp.mean(local_LxnxK, axis=1),
        local=local_LxnxK,
        growth=jnp.stack(growth, axis=1),
        signals={name: jnp.mean(jnp.stack(gains), axis=0) for name, gains in signals.items()},
        frames=jnp.stack(frames, axis=1) if keep_frames else None,
    )


def _layer(
    decoder: Decoder, params: Params, number: int, x_LxD: Array, positions_L: Array
) -> Callable[[Array], tuple[Array, dict[str, Array]]]:
    """The layer at x as a map of all tokens separately: to the stream after it and the signals of its groups."""
    plan, here = decoder.plan or Plan(), str(number % decoder.config.num_layers)
    layer = layer_of(decoder, params, number, hold_others=True)
    # Not stop_gradient: the derivative of a rate with respect to the parameters includes the other tokens' keys and
    # values.
    _, others = apply_layer(
        decoder, params, number, x_LxD, positions_L, init_cache(decoder.config, 1, 0, x_LxD.dtype)[0]
    )

    def advance(x_LxD: Array) -> tuple[Array, dict[str, Array]]:
        y_1xLxD, inputs = layer.read(x_LxD[None], positions_L[None], others)
        signals: dict[str, Array] = {}
        for block in decoder.config.blocks():
            at, site = input_site(block.name)
            group = plan.group_of.get(block.name)
            if site not in inputs:  # an expert's own hidden neurons, which not every token has
                continue
            if at == here and group is not None and group.name not in signals:
                states = layer.groups[group.name]
                signals[group.name] = encode(group.kernel, states, inputs[site][0], pivots=group.pivots)
        return y_1xLxD[0], signals

    return advance
