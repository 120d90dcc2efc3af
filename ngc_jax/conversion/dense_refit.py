"""Error propagation in the form `dense`: refit the matrices that write to the residual stream, layer by layer.

A pruned model's layer reads a residual stream x' in place of the dense model's x, and its o and d blocks read inputs c'
in place of c. Each of them, W of shape M x I, is replaced by the least-squares estimate of

    W c + (x - x')     from     c'

so that it computes what the dense block computes, and corrects the error that the layers below left in the stream (the
error divided by the residual scale, where blocks are added with one). d is
estimated after o, on inputs that the new o computes. Both are unconstrained matrices, so that no metric of the outputs
matters. The estimate mixes, with a share s, the moments of some tokens of both models with those of the dense model's
inputs alone, C, for which the weight as it is, W, is best:

    W' = (s E[(W c + x - x') c'^T] + (1 - s) W C) (s E[c' c'^T] + (1 - s) C)^-1

Legend: K batches of a stack, B windows of a batch, L tokens, D width of the stream, M outputs and I inputs of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ngc_jax.conversion.closed_form import mean_diagonal
from ngc_jax.conversion.state import ConversionState
from ngc_jax.conversion.statistics import token_rows
from ngc_jax.conversion.symmetric_sums import add_products, mean_product, no_products
from ngc_jax.models.config import block_name
from ngc_jax.models.layers import INPUT_SITE, DecoderLayer
from ngc_jax.models.layerwise import (
    Compensated,
    Layer,
    Stack,
    each_batch,
    embed,
    layer_module,
    run_stack,
    stack_batches,
)
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params

# Relative to the mean diagonal of the inputs' second moment, in case it is singular.
_RIDGE = 1e-6
_MODULES = {"o": "attn", "d": "mlp"}


class Both(NamedTuple):
    """Residual streams before a layer, (K, B, L, D): the dense model's and the pruned one's."""

    theirs: Array
    ours: Array


class Sums(NamedTuple):
    """Sums over tokens: target c'^T (M, I), and c' c'^T."""

    cross: Compensated
    second: tuple[Compensated, ...]


def refit_dense(state: ConversionState, strength: float, shrinkage: float) -> LanguageModel:
    """Refit o and d of all layers of a pruned model on the inputs that the layers below them produce.

    Args:
        state: With a pruned model, the original, and statistics of its blocks, as a list or as a stream that prunes.
        strength: s, from 0, which changes nothing, to 1.
        shrinkage: Of the inputs' second moments, as for `fitting.shrunk`.
    """
    pruned, calibration = state.compact, state.calibration
    original = state.original
    assert pruned is not None
    assert original is not None
    mesh, config = calibration.mesh, pruned.config
    tokens = calibration.tokens[: calibration.propagation_tokens]
    stacks = stack_batches(tokens, calibration.window, calibration.batch_size, mesh=mesh)
    decoders = [one.decoder.clone(dtype=None) for one in (original, pruned)]
    streams = [Both(first := embed(decoders[1], pruned.params, stack.tokens), first) for stack in stacks]
    layers: dict[str, Params] = {}
    for layer, statistics in enumerate(state.statistics):
        dense, own = original.params["layers"][str(layer)], state.dense.params["layers"][str(layer)]
        modules = layer_module(decoders[0], layer), layer_module(decoders[1], layer)
        for role, module in _MODULES.items():
            kernel = own[module][role]["kernel"]
            sums = Sums(Compensated.zeros_like(jnp.zeros(kernel.shape)), no_products(kernel.shape[1]))
            for stream, stack in zip(streams, stacks, strict=True):
                sums = _add_tokens((dense, own), stream, stack, sums, role=role, layers=modules, mesh=mesh)
            moments = sums.cross.value() / len(tokens), mean_product(sums.second, len(tokens))
            known = statistics[block_name(layer, role)].second_moment
            new = estimate(np.asarray(kernel, np.float64), known, *moments, strength=strength, shrinkage=shrinkage)
            new = jax.device_put(new.astype(kernel.dtype), kernel.sharding)
            own = {**own, module: {**own[module], role: {**own[module][role], "kernel": new}}}
        for index, stack in enumerate(stacks):
            # Run one after the other: both need as much memory as a stack of hidden activations.
            theirs = run_stack(dense, streams[index].theirs, stack.positions, layer=modules[0], mesh=mesh)
            ours = run_stack(own, streams[index].ours, stack.positions, layer=modules[1], mesh=mesh)
            streams[index] = Both(theirs, ours)
        layers[str(layer)] = own
        state.report("propagate", layer + 1, config.num_layers)
    return dataclasses.replace(pruned, params={**pruned.params, "layers": layers})


def estimate(
    weight: Float[np.ndarray, "M I"],
    second_moment: Float[np.ndarray, "I I"],
    cross: Float[np.ndarray, "M I"],
    converted: Float[np.ndarray, "I I"],
    *,
    strength: float,
    shrinkage: float,
) -> Float[np.ndarray, "M I"]:
    """W' of the equation above.

    Args:
        weight: W.
        second_moment: C of all calibration tokens.
        cross: E[target c'^T] of some of them.
        converted: E[c' c'^T] of the same.
        strength: s.
        shrinkage: How far second moments are shrunk towards their diagonals; W' is then drawn to W where an input has
            little energy that the others do not explain.
    """
    total = strength * converted + (1 - strength) * second_moment
    floor = shrinkage * np.diag(total) + _RIDGE * mean_diagonal(total)
    target = (1 - shrinkage) * (strength * cross + (1 - strength) * weight @ second_moment) + weight * floor
    total *= 1 - shrinkage
    total[np.diag_indices_from(total)] += floor
    return np.asarray(scipy.linalg.solve(total, target.T, assume_a="pos", overwrite_a=True, check_finite=False)).T


@partial(jax.jit, static_argnames=("role", "layers", "mesh"), donate_argnames=("sums",))
def _add_tokens(
    params: tuple[Params, Params],
    streams: Both,
    stack: Stack,
    sums: Sums,
    *,
    role: str,
    layers: tuple[DecoderLayer, DecoderLayer],
    mesh: Mesh | None,
) -> Sums:
    """Add the tokens of a stack to the sums of a block that writes to the residual stream."""
    module = _MODULES[role]

    config = layers[0].config

    def step(params: tuple[Params, Params], data: Mapping[str, Any], both: Both, sums: Sums) -> tuple[Both, Sums]:
        found = []
        for layer, own, x in zip(layers, params, both, strict=True):
            after, sites = Layer(layer, own).read(x, data["positions"])
            inputs = sites[INPUT_SITE[role]]
            written = jnp.einsum("...i,oi->...o", inputs, own[module][role]["kernel"], precision="highest")
            # The stream that the block writes to. Its biases are equal in both models.
            found.append((inputs, written, x if role == "o" else after - config.residual_scale * written))
        (_, target, x), (inputs, _, x_ours) = found
        if not config.post_norms:  # where outputs are normed first, they cannot correct the stream
            target = target + (x - x_ours) / config.residual_scale
        rows, target = token_rows(inputs, data["mask"]), token_rows(target, data["mask"])
        cross = jnp.einsum("tm,ti->mi", target, rows, precision="highest")
        return both, Sums(sums.cross.add(cross), add_products(sums.second, rows))

    data = {"positions": stack.positions, "mask": stack.mask}
    return each_batch(step, params, data, streams, sums, mesh=mesh)[1]
