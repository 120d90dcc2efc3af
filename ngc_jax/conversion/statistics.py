"""Calibration: statistics of every block's inputs, streamed layer by layer.

Legend: K batches of a stack, B windows of a batch, L tokens, D width of a block's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ngc_jax.conversion.experts import ExpertSums, experts_of, input_means, no_inputs, row_weights, token_weights
from ngc_jax.conversion.experts import add_inputs as add_expert_inputs
from ngc_jax.conversion.state import Calibration, check_dense
from ngc_jax.conversion.symmetric_sums import add_products, mean_product, no_products
from ngc_jax.errors import UsageError
from ngc_jax.host_memory import handed_over
from ngc_jax.models.config import MLP_ROLES, DecoderConfig
from ngc_jax.models.layers import INPUT_SITE, DecoderLayer
from ngc_jax.models.layerwise import (
    BATCHES_PER_CALL,
    ROWS,
    Compensated,
    Layer,
    Stack,
    checked_tokens,
    each_batch,
    embed,
    layer_module,
    stack_batches,
)
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params


@dataclasses.dataclass(frozen=True)
class OutputGradients:
    """Backward-pass statistics of a block; g is the gradient of the loss, summed over tokens, by the block's output.

    Attributes:
        count: Tokens measured.
        mean_square: Diagonal of G = E[g g^T], (M,), float64.
        second_moment: G, (M, M), or W^T G W, (I, I), when the block has more outputs than inputs and G was not
            requested; None if only the diagonal was measured.
        slope: The mean of g^T (W - W_0) x over tokens: how fast the loss rises as the block's weight continues from
            W_0, the teacher's, beyond W; None unless requested.
    """

    count: int
    mean_square: np.ndarray
    second_moment: np.ndarray | None = None
    slope: float | None = None


@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """A block's inputs on the first tokens: their number, and E[x x^T], (d_in, d_in), float32."""

    count: int
    second_moment: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics that calibration measured for a block.

    Attributes:
        count: Tokens measured.
        second_moment: C = E[x x^T], (d_in, d_in), float64.
        absolute_mean: E|x|, (d_in,), float64.
        fisher: The mean square gradient of the loss by each column of the weight, summed over outputs, (d_in,),
            float64; None unless requested.
        gradients: Of the loss by the block's outputs; None unless requested.
        first: Of the tokens that were read before `calibrate` began; None unless requested.
        site: The input site, such as `layers.3.attn_input`. Blocks with the same site read the same input. Empty if no
            other block reads it.
    """

    count: int
    second_moment: np.ndarray
    absolute_mean: np.ndarray
    fisher: np.ndarray | None = None
    gradients: OutputGradients | None = None
    first: FirstTokens | None = None
    site: str = ""


class Moments(NamedTuple):
    """Running sums over the tokens of one input site; second moments are `symmetric_sums.Bands`."""

    second: tuple[Compensated, ...]
    absolute: Compensated


def init_moments(width: int) -> Moments:
    """Empty sums for inputs of `width` neurons."""
    return Moments(no_products(width), Compensated.zeros_like(jnp.zeros(width)))


class InputSums:
    """Sums over the inputs of all blocks: begun by a pass over some tokens, completed by `calibrate`.

    Attributes:
        count: Tokens read.
        layers: By layer and input site.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.count = 0
        self.layers = {layer: _init_sites(config, layer) for layer in range(config.num_layers)}


SiteSums = dict[str, "Moments | ExpertSums"]


def _init_sites(config: DecoderConfig, layer: int) -> SiteSums:
    count = experts_of(config, layer)
    found: SiteSums = {}
    for role in config.roles:
        if count and role in MLP_ROLES:
            found[INPUT_SITE[role]] = no_inputs(count, config.block(layer, role, 0).d_in)
        else:
            found[INPUT_SITE[role]] = init_moments(config.block(layer, role).d_in)
    return found


def add_tokens(moments: Moments, x_BxLxD: Float[Array, "B L D"], mask_BxL: Float[Array, "B L"] | None) -> Moments:
    """Add the tokens whose mask is 1.

    Args:
        moments: Sums so far.
        x_BxLxD: Inputs of a block.
        mask_BxL: 1 for a token, 0 for padding; None if there is none.
    """
    x_TxD = token_rows(x_BxLxD, mask_BxL)
    return Moments(add_products(moments.second, x_TxD), moments.absolute.add(jnp.abs(x_TxD).sum(axis=0)))


def token_rows(x_BxLxD: Float[Array, "B L D"], mask_BxL: Float[Array, "B L"] | None) -> Float[Array, "T D"]:
    """The tokens of a batch below each other, in float32; rows of zeros where the mask is 0."""
    x = x_BxLxD.astype(jnp.float32)
    # A product with a mask of ones would take a fifth of the time of the sums on a CPU.
    return (x if mask_BxL is None else x * mask_BxL[..., None]).reshape(-1, x.shape[-1])


@partial(jax.jit, static_argnames=("layer", "mesh"), donate_argnames=("moments",))
def add_inputs(
    params: Params,
    x: Float[Array, "K B L D"],
    stack: Stack,
    moments: SiteSums,
    *,
    layer: DecoderLayer,
    mesh: Mesh | None = None,
) -> tuple[Array, SiteSums]:
    """Run one dense layer on a stack of batches and add its blocks' inputs to the sums.

    Args:
        params: The layer's.
        x: The residual streams before it.
        stack: The tokens.
        moments: Sums so far, by input site.
        layer: From `layer_module`.
        mesh: As for `each_batch`.

    Returns:
        The residual streams after it, and the sums.
    """

    def step(params: Params, data: Mapping[str, Any], x: Array, moments: SiteSums) -> tuple[Array, SiteSums]:
        y, inputs = Layer(layer, params).read(x, data["positions"])
        new: SiteSums = {}
        for site, sums in moments.items():
            if isinstance(sums, ExpertSums):
                new[site] = _add_experts(sums, site, inputs, data["mask"])
            else:
                new[site] = add_tokens(sums, inputs[site], data["mask"])
        return y, new

    return each_batch(step, params, {"positions": stack.positions, "mask": stack.mask}, x, moments, mesh=mesh)


def _add_experts(
    sums: ExpertSums, site: str, inputs: Mapping[str, Any], mask_BxL: Float[Array, "B L"] | None
) -> ExpertSums:
    """Add the inputs of the experts of a batch, of u and g (tokens) or of d (rows)."""
    rows, x = inputs[ROWS], inputs[site].reshape(-1, inputs[site].shape[-1])
    weights = row_weights(rows, len(sums.rows), None if mask_BxL is None else mask_BxL.reshape(-1))
    return add_expert_inputs(sums, x, weights if site == INPUT_SITE["d"] else token_weights(rows, weights, len(x)))


def calibrate(
    model: LanguageModel,
    calibration: Any,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[tuple[int, dict[str, Statistics]]]:
    """Measure the inputs of every block of a dense model on a text, one layer after the other; see `measure_inputs`.

    Args:
        model: The dense model.
        calibration: A `Calibration`; or a text or token ids, which `Calibration.of` takes with `options`.
        progress: Called with (layer batches done, total).
        options: Of the calibration, such as `window` and `bos`.

    Returns:
        An iterator over a layer's number and the statistics of its blocks by name.

    Raises:
        UsageError: If the model is compact, or there are no tokens or they are not the model's. When the iterator is
            read, if a layer's activations are not finite.

    Example:
        >>> layer, statistics = next(calibrate(model, text, window=32))
        >>> statistics["layers.0.attn.q"].second_moment.shape  # the width of the model, twice
        (24, 24)
    """
    if not isinstance(model, LanguageModel):
        raise UsageError(f"calibrate was given {type(model).__name__}; expected a model, as load_model returns it")
    check_dense(model)
    return measure_inputs(model, Calibration.given(model, calibration, options), progress=progress)


def measure_inputs(
    model: LanguageModel,
    calibration: Calibration,
    *,
    begun: InputSums | None = None,
    keep_first: bool = False,
    batches_per_call: int = BATCHES_PER_CALL,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, dict[str, Statistics]]]:
    """Measure the inputs of every block of a dense model, one layer after the other.

    All tokens pass through a layer before the next one runs, so that only one layer's sums exist at a time and one
    compiled function serves every layer.

    Args:
        model: The dense model; it runs in the type of its parameters.
        calibration: The tokens, and how they are run. With a mesh, the parameters are on all of its devices.
        begun: Sums over tokens that were read before these; consumed layer by layer.
        keep_first: Also yield the statistics of the tokens of `begun` alone.
        batches_per_call: Batches of a stack.
        progress: Called with (layer batches done, total).

    Yields:
        A layer's number and the statistics of its blocks by name. Blocks with the same input site share the arrays.

    Raises:
        UsageError: If there are no tokens or they are not the model's, or a layer's activations are not finite.
    """
    config, params, mesh = model.config, model.params, calibration.mesh
    decoder = model.decoder.clone(dtype=None)
    tokens = checked_tokens(calibration.tokens, config)
    count = len(tokens) + (0 if begun is None else begun.count)
    if count < 1:
        raise UsageError("there are no tokens to calibrate on; give a longer text")
    stacks: list[Stack] = []
    if len(tokens):
        stacks = stack_batches(tokens, calibration.window, calibration.batch_size, batches_per_call, mesh)
    counts = np.cumsum([stack.used() for stack in stacks])
    streams = [embed(decoder, params, stack.tokens) for stack in stacks]
    for layer in range(config.num_layers):
        moments = _init_sites(config, layer) if begun is None else begun.layers.pop(layer)
        first: dict[str, FirstTokens] = {}
        if begun is not None and keep_first:
            first = {
                site: FirstTokens(begun.count, mean_product(sums.second, begun.count).astype(np.float32))
                for site, sums in moments.items()
                if isinstance(sums, Moments)
            }
        module = layer_module(decoder, layer)
        for index, stack in enumerate(stacks):
            streams[index], moments = add_inputs(
                params["layers"][str(layer)], streams[index], stack, moments, layer=module, mesh=mesh
            )
            if progress is not None:
                jax.block_until_ready(moments)
                progress(layer * int(counts[-1]) + int(counts[index]), config.num_layers * int(counts[-1]))
        by_site: dict[str, Statistics] = {}
        for site in list(moments):
            sums, name = moments.pop(site), f"layers.{layer}.{site}"
            if isinstance(sums, ExpertSums):
                means = input_means(sums, count, hidden=site == INPUT_SITE["d"])
                by_site |= {
                    f"{site}.{expert}": Statistics(
                        mean.rows, mean.second_moment, mean.absolute_mean, site=f"{name}.{expert}"
                    )
                    for expert, mean in enumerate(means)
                }
            else:
                by_site[site] = _statistics(sums, count, first.get(site), name)
        for site, statistics in by_site.items():
            if not np.isfinite(statistics.second_moment).all():
                raise UsageError(
                    f"the activations of layer {layer} ({site}) are not finite; load the model with --dtype float32"
                )
        by_name = {}
        for block in config.layer_blocks(layer):
            role, *expert = block.name.split(".")[3:]
            by_name[block.name] = by_site[".".join([INPUT_SITE[role], *expert])]
        del by_site, statistics
        yield layer, handed_over(by_name)


def _statistics(moments: Moments, count: int, first: FirstTokens | None, site: str) -> Statistics:
    second, absolute = mean_product(moments.second, count), moments.absolute.value() / count
    return Statistics(count, second, absolute, first=first, site=site)
