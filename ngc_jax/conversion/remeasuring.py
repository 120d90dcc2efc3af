"""Update the statistics of a conversion with gradients measured on the converted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import traverse_util

from ngc_jax.conversion.closed_form import RIDGE, mean_diagonal
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.state import ConversionState
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.conversion.thread_map import thread_map
from ngc_jax.groups.gauge import free_gauge
from ngc_jax.groups.plan import Block, GroupPlan
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.types import Params

if TYPE_CHECKING:
    from ngc_jax.conversion.passes.factorise import Factorise

# Gradients of the converted model are measured on this share of the number of tokens of the dense model's,
REMEASURED = 1 / 2
# and on at most this number of tokens.
_ENOUGH = 8192
# The exponent of a correction: halfway, on a logarithmic scale.
_POWER = 0.5
# Strength of the shrinkage of corrections to 1, as a slope in nats per token times tokens; see
# `sensitivity_corrections`.
_PRIOR = 12.0
# Upper and lower limit of a layer's or a role's factor in a correction.
_MOST = 10.0


def tokens_again(tokens: np.ndarray, gradient_tokens: int, multiple: int = 1) -> np.ndarray:
    """Tokens for the converted model's gradients: if possible, others than those of the dense model's gradients.

    Args:
        tokens: (T,) calibration tokens.
        gradient_tokens: Number of tokens, from the first, of the dense model's gradients.
        multiple: Begin at a multiple of this: of the window, where every window begins with BOS.
    """
    count = max(min(round(gradient_tokens * REMEASURED), _ENOUGH), 2)
    start = max(min(gradient_tokens, len(tokens) - count), 0) // multiple * multiple
    return tokens[start : start + count]


def mixed_share(keep_ratio: float) -> float:
    """The converted model's share in mixed gradient statistics; larger for lower keep ratios.

    Chosen by perplexity on text that is neither calibration nor evaluation (docs/measured.md).
    """
    return 0.2 + 0.4 * (1 - keep_ratio)


def remeasured(state: ConversionState, factorise: Factorise, *, sensitivities: bool) -> list[dict[str, Statistics]]:
    """Mix gradients measured on the converted model into the gradients' second moments.

    The second-order increase of the loss from the dense to the compact model depends on the curvature along that line,
    of which the dense model's is the start. The compact model's has the weight `mixed_share` in the sum. With
    sensitivities every block's sum is then multiplied by the square root of its `sensitivity_corrections`: halfway, on
    a logarithmic scale, from the prediction to a measurement at one end of the line.

    Args:
        state: With a compact model, and the statistics that it was converted with, as a list of layers.
        factorise: The factorisation of the conversion.
        sensitivities: Whether to correct expected losses.
    """
    model, compact, calibration = state.dense, state.compact, state.calibration
    assert compact is not None
    statistics = list(state.statistics)
    multiple = calibration.window if calibration.prefix else 1
    tokens = tokens_again(calibration.tokens, calibration.gradient_tokens, multiple)

    layers = [dense_layer(model, compact, layer) for layer in range(model.config.num_layers)]
    again, _ = measure_output_gradients(
        model,
        dataclasses.replace(calibration, tokens=tokens, batch_size=max(calibration.batch_size // 2, 1)),
        GradientMeasurement(geometry=factorise.gradients, slopes=sensitivities),
        layer_params=layers.__getitem__,
        progress=lambda *a: state.report("again", *a),
    )

    assert compact.plan is not None
    share = mixed_share(compact.plan.keep_ratio())
    factors = {name: 1.0 for layer in statistics for name in layer}
    if sensitivities:

        def slope(block: tuple[int, str, Statistics]) -> float:
            number, name, entry = block
            weight = np.asarray(kernel_of(model.params, name), np.float64)
            now = kernel_of(layers[number], ".".join(name.split(".")[2:]))
            return predicted_slope(weight, np.asarray(now, np.float64) - weight, entry)

        blocks = [(number, name, entry) for number, layer in enumerate(statistics) for name, entry in layer.items()]
        inputs = [len(entry.second_moment) for _, _, entry in blocks]
        slopes = thread_map(slope, blocks, costs=inputs, widths=inputs)
        predicted = {name: found for (_, name, _), found in zip(blocks, slopes, strict=True)}
        measured = {name: again[name].slope or 0.0 for name in predicted}
        factors = sensitivity_corrections(predicted, measured, len(tokens))

    def mixed(before: OutputGradients | None, now: OutputGradients, factor: float) -> OutputGradients:
        assert before is not None
        second = None
        if before.second_moment is not None and now.second_moment is not None:
            second = factor * ((1 - share) * before.second_moment + share * now.second_moment)
        mean_square = factor * ((1 - share) * before.mean_square + share * now.mean_square)
        return OutputGradients(before.count + now.count, mean_square, second)

    return [
        {
            name: dataclasses.replace(s, gradients=mixed(s.gradients, again[name], factors[name] ** _POWER))
            for name, s in layer.items()
        }
        for layer in statistics
    ]


def predicted_slope(weight: np.ndarray, change: np.ndarray, statistics: Statistics) -> float:
    """The predicted slope of the loss at the end of a line along which it rises by tr(G D C D^T) / 2.

    Args:
        weight: (M, I), the dense W.
        change: (M, I), D: the compact model's weight minus W. Where only W^T G W was measured, the part of it that is
            not W times a matrix is left out.
        statistics: With gradients.

    Returns:
        tr(G D C D^T): the slope at the end of a second-order increase is twice the increase.
    """
    gradients, moment = statistics.gradients, statistics.second_moment
    assert gradients is not None
    metric = gradients.second_moment
    if metric is None:
        return float(gradients.mean_square @ np.einsum("mi,ij,mj->m", change, moment, change, optimize=True))
    if len(metric) != len(weight):
        gram = weight.T @ weight
        gram += RIDGE * mean_diagonal(gram) * np.eye(len(gram))
        change = scipy.linalg.solve(gram, weight.T @ change, assume_a="pos")
    return float(np.vdot(metric @ change, change @ moment))


def sensitivity_corrections(
    predicted: Mapping[str, float], measured: Mapping[str, float], tokens: int
) -> dict[str, float]:
    """Factors that make predicted slopes of the loss agree with measured ones, layer by layer and role by role.

    One block's measured slope is mostly noise. A factor is therefore a layer's times a role's, such that the sums over
    every layer and over every role agree (iterative proportional fitting: the Poisson likelihood's maximum).

    Factors are shrunk by their uncertainty. A slope p is the mean over N tokens of g^T D x, whose mean square is p in
    the same approximation (K-FAC): its measurement error has the variance c p / N, with c above 1 since tokens are not
    independent. If the factors themselves scatter around 1 with variance v, the best estimate of one is
    (measured + a) / (predicted + a) with a = c / (v N); c / v is `_PRIOR`.

    Args:
        predicted: By block name, 0 where nothing changed.
        measured: By block name.
        tokens: N.

    Returns:
        By block name; 1 for all if nothing changed.
    """
    places = {name: (name.split(".")[1], name.split(".")[3]) for name in predicted}
    prior = _PRIOR / tokens
    factors: list[dict[str, float]] = [
        dict.fromkeys((place[axis] for place in places.values()), 1.0) for axis in (0, 1)
    ]
    for _ in range(100):
        for axis in (0, 1):
            for key in factors[axis]:
                names = [name for name, place in places.items() if place[axis] == key]
                expected = sum(predicted[name] * factors[1 - axis][places[name][1 - axis]] for name in names)
                if expected > 0:
                    found = (sum(measured[name] for name in names) + prior) / (expected + prior)
                    factors[axis][key] = min(max(found, 1 / _MOST), _MOST)
    return {name: factors[0][layer] * factors[1][role] for name, (layer, role) in places.items()}


def dense_layer(model: LanguageModel, compact: LanguageModel, layer: int) -> Params:
    """A layer of a compact model with its weights formed, so that it runs as a dense layer."""
    assert compact.plan is not None
    flat = traverse_util.flatten_dict(dict(compact.params["layers"][str(layer)]))
    stacks: dict[tuple[str, ...], list[Any]] = {}
    for block in model.config.layer_blocks(layer):
        path, expert = block.name.split(".")[2:4], block.name.split(".")[4:]
        group = compact.plan.group_of.get(block.name)
        formed = None if group is None else _formed(compact, group, block).astype(model.param_dtype)
        if expert:
            stacks.setdefault((*path, "kernel"), []).append(formed)
        elif formed is not None:
            flat[(*path, "kernel")] = jnp.asarray(formed)
    for name, kernels in stacks.items():
        dense = iter(np.asarray(flat[name]) if name in flat else ())
        flat[name] = jnp.asarray(np.stack([next(dense) if kernel is None else kernel for kernel in kernels]))
    return traverse_util.unflatten_dict(flat)


def _formed(compact: LanguageModel, group: GroupPlan, block: Block) -> np.ndarray:
    """The weights of a member of a bilinear group, in float32."""
    # On the host: every rank is a new shape, which a device would have to compile for.
    states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), compact.params["groups"][group.name])
    inputs = states["input_states"]
    if group.pivots is not None:
        inputs = free_gauge(group.pivots, inputs, group.d_in)
    weight: np.ndarray = states["output_states"][block.name] @ inputs[: block.d_in].T
    return weight
