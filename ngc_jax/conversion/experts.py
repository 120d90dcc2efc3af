"""Statistics of experts, weighted by their routing.

An expert's output enters the residual stream times its routing weight p, so that an error E of one of its blocks costs
p^2 g^T E x x^T E^T g of a token with input x and gradient g by the layer's output. With sums over the tokens routed to
expert e,

    C_e = sum p^2 x x^T / (all tokens),    G_e = sum p^2 g g^T / sum p^2,

the loss rises by about tr(G_e E C_e E^T) / 2 per token, as for other blocks (`output_gradients`): C_e says how often
and how strongly an expert is used, G_e what its outputs matter where it is. The gradient by the expert's own output is
p g already. Without gradients, G the identity, C_e alone weights the experts. The second moments of several experts
add up to that of all of them, which is what methods that pool second moments use.

An expert that few tokens were routed to is shrunk towards the layer's average: to its sums, those of
`PRIOR_TOKENS` times the width of its input further rows are added, each the average over all rows of the layer. Of
matrices over hidden neurons, which are different ones in every expert, the average is a multiple of the identity.

Legend: N rows or tokens, E experts, I inputs, M outputs of a block, F hidden neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ngc_jax.conversion.block_gradients import add_tokens
from ngc_jax.conversion.symmetric_sums import add_products, no_products, whole, zero_bands
from ngc_jax.groups.plan import Block
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.experts import Rows
from ngc_jax.models.layerwise import Compensated

# Rows of the layer's average that are added to every expert's own, relative to the width of the block's input.
PRIOR_TOKENS = 1 / 8


class ExpertSums(NamedTuple):
    """Running sums over the inputs of the experts of a layer; every array has a leading axis of E experts.

    Attributes:
        second: Of p^2 x x^T, as `symmetric_sums.Bands`.
        absolute: Of p |x|.
        rows: Number of rows, (E,).
    """

    second: tuple[Compensated, ...]
    absolute: Compensated
    rows: Array


def no_inputs(experts: int, width: int) -> ExpertSums:
    """Empty sums for inputs of `width` neurons."""

    def each(leaf: Array) -> Array:
        return jnp.zeros((experts, *leaf.shape), leaf.dtype)

    second = jax.tree.map(each, no_products(width))
    zeros = Compensated.zeros_like
    return ExpertSums(second, zeros(jnp.zeros((experts, width))), jnp.zeros(experts))


def row_weights(rows: Rows, experts: int, mask_N: Float[Array, " T"] | None) -> Float[Array, "E R"]:
    """Of every expert, the routing weight of each row; 0 for rows of other experts and of padding."""
    weights_R = rows.weights if mask_N is None else rows.weights * mask_N[rows.tokens]
    return jnp.where(rows.experts == jnp.arange(experts)[:, None], weights_R, 0.0)


def token_weights(rows: Rows, weights_ExR: Float[Array, "E R"], tokens: int) -> Float[Array, "E T"]:
    """Of every expert, the routing weight of each token."""
    return jnp.zeros((len(weights_ExR), tokens)).at[:, rows.tokens].add(weights_ExR)


def add_inputs(sums: ExpertSums, x_NxI: Float[Array, "N I"], weights_ExN: Float[Array, "E N"]) -> ExpertSums:
    """Add inputs; an expert's weight is 0 for those that it does not read."""
    x_NxI = x_NxI.astype(jnp.float32)

    def one(of_expert: tuple[ExpertSums, Array]) -> ExpertSums:
        sums, weights_N = of_expert
        weighted = x_NxI * weights_N[:, None]
        return ExpertSums(
            add_products(sums.second, weighted),
            sums.absolute.add(jnp.abs(weighted).sum(axis=0)),
            sums.rows + (weights_N > 0).sum(),
        )

    return jax.lax.map(one, (sums, weights_ExN))


class InputMeans(NamedTuple):
    """Of one expert: C_e, the mean of p |x| over all tokens, and the number of rows."""

    second_moment: np.ndarray
    absolute_mean: np.ndarray
    rows: int


def input_means(sums: ExpertSums, tokens: int, *, hidden: bool) -> list[InputMeans]:
    """The experts' means over `tokens` tokens, shrunk; `hidden` if the inputs are hidden neurons."""
    rows_E = np.asarray(sums.rows, np.float64)
    seconds = [whole(band.value() for band in _of_expert(sums.second, e)) for e in range(len(rows_E))]
    absolutes = sums.absolute.value()
    further, rows = PRIOR_TOKENS * absolutes.shape[1], max(rows_E.sum(), 1.0)
    shrunk = _shrunk(seconds, [further] * len(seconds), rows, hidden)
    absolute_average = absolutes.sum(axis=0) / rows
    if hidden:
        absolute_average = np.full_like(absolute_average, absolute_average.mean())
    return [
        InputMeans(second / tokens, (absolute + further * absolute_average) / tokens, int(count))
        for second, absolute, count in zip(shrunk, absolutes, rows_E, strict=True)
    ]


def _of_expert(sums: Any, expert: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[expert], sums)


def _shrunk(sums: Sequence[np.ndarray], further: Sequence[float], total: float, hidden: bool) -> list[np.ndarray]:
    """Sums (matrices, or diagonals of some) with `further` average rows, of `total` in all."""
    average = np.sum(sums, axis=0) / total
    if hidden:
        size = float((np.diag(average) if average.ndim == 2 else average).mean())
        average = size * np.eye(len(average)) if average.ndim == 2 else np.full(len(average), size)
    return [one + count * average for one, count in zip(sums, further, strict=True)]


def no_gradients(experts: int, block: Block, *, full: bool, second: bool, slopes: bool) -> dict[str, Any]:
    """Empty sums over the gradients by the outputs of a role's blocks; `full` as for `output_gradients`."""
    sums: dict[str, Any] = {"mean_square": jnp.zeros((experts, block.d_out)), "weight": jnp.zeros(experts)}
    if second:
        width = block.d_out if full else min(block.d_out, block.d_in)
        sums["second_moment"] = tuple(jnp.zeros((experts, *band.shape)) for band in zero_bands(width))
    if slopes:
        sums["slope"] = jnp.zeros(experts)
    return sums


def add_gradients(
    sums: Mapping[str, Any],
    kernels: tuple[Float[Array, "E M I"], Float[Array, "E M I"]],
    x_RxI: Float[Array, "R I"],
    g_RxM: Float[Array, "R M"],
    weights_ExR: Float[Array, "E R"],
    full: bool,
) -> dict[str, Any]:
    """Add the rows of a batch; `kernels` are those of the model that runs, and the dense model's."""
    x_RxI, g_RxM = x_RxI.astype(jnp.float32), g_RxM.astype(jnp.float32)

    def one(of_expert: tuple[Mapping[str, Any], Array, Array, Array]) -> dict[str, Any]:
        sums, kernel_MxI, teacher_MxI, weights_R = of_expert
        g = jnp.where((weights_R > 0)[:, None], g_RxM, 0.0)
        new = add_tokens(sums, kernel_MxI, teacher_MxI, x_RxI, g, full)
        return {**new, "weight": sums["weight"] + jnp.square(weights_R).sum()}

    return jax.lax.map(one, (dict(sums), *kernels, weights_ExR))


def gradient_means(sums: Mapping[str, Any], block: Block, tokens: int, *, hidden: bool) -> list[dict[str, Any]]:
    """Of every expert the fields of `OutputGradients`, shrunk; `hidden` if the outputs are hidden neurons.

    Args:
        sums: From `add_gradients`.
        block: Any expert's.
        tokens: All of them.
        hidden: Whether the outputs are hidden neurons; of the others the inputs are.
    """
    weights_E = np.asarray(sums["weight"], np.float64)
    count, total = len(weights_E), max(float(weights_E.sum()), 1e-30)
    # Further rows, in units of p^2: of the average routing weight.
    further = PRIOR_TOKENS * block.d_in * total / max(tokens, 1)
    squares = list(np.asarray(sums["mean_square"], np.float64))
    found: list[dict[str, Any]] = []
    squares = _shrunk(squares, [further] * count, total, hidden)
    seconds: list[np.ndarray | None] = [None] * count
    if "second_moment" in sums:
        bands = [np.asarray(band) for band in sums["second_moment"]]
        each = [whole(band[expert] for band in bands) for expert in range(count)]
        # W^T G W, where it takes the place of G, is a matrix over the inputs.
        over_inputs = len(each[0]) != block.d_out
        seconds = list(_shrunk(each, [further] * count, total, hidden != over_inputs))
    for expert in range(count):
        divisor = weights_E[expert] + further
        second = seconds[expert]
        fields: dict[str, Any] = {
            "mean_square": squares[expert] / divisor,
            "second_moment": None if second is None else second / divisor,
        }
        if "slope" in sums:
            fields["slope"] = float(sums["slope"][expert]) / tokens
        found.append(fields)
    return found


def experts_of(config: DecoderConfig, layer: int) -> int:
    """Number of experts of a layer; 0 if its MLP is dense."""
    return config.experts.count if config.experts is not None and config.is_sparse(layer) else 0
