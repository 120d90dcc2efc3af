"""Quantise a model: dense weights in the geometry of their inputs, groups from the input side to the output side.

A group's input states are rounded first, in the geometry of its inputs and of its signal, whose errors cost what the
members' output states make of them. Those are then fitted again to the signal of the rounded input states (least
squares: what the group computed before is the target), and rounded in the geometry of that signal. Unit pivot states
are not stored, hence exact. The unembedding comes last, in the geometry of the model's final hidden states.

Legend: I inputs of a group, R rank, O input neurons whose states are stored, J outputs of a member.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import scipy.linalg
from flax import traverse_util

from ngc_jax.conversion.alternating import pad_square
from ngc_jax.conversion.closed_form import RIDGE, mean_diagonal
from ngc_jax.conversion.rounding import Grid, round_to_nearest, round_with_feedback
from ngc_jax.conversion.state import ConversionState
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.conversion.thread_map import thread_map
from ngc_jax.conversion.unembedding_input import measure_unembedding_input
from ngc_jax.errors import UsageError
from ngc_jax.groups.gauge import free_gauge, other_neurons
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.groups.quantised import QuantisedMatrix
from ngc_jax.models.load import LanguageModel, kernel_of

if TYPE_CHECKING:
    from ngc_jax.conversion.passes.quantise import Quantise

# Of a tied matrix: what an error of the embedding costs, relative to the mean energy of what the unembedding reads.
# Chosen among 0, 0.1 and 1 for SmolLM2 in 3 and 4 bits.
_EMBEDDING_SHARE = 0.1


def quantise_model(state: ConversionState, options: Quantise) -> LanguageModel:
    """The model of a conversion with quantised matrices.

    Args:
        state: With a compact model and, for feedback, the statistics of its blocks as a list; or without one, and with
            the statistics as a stream, of which one layer is held at a time.
        options: The pass.
    """
    grid = Grid(options.bits, options.group_size, options.symmetric)
    model = state.dense if state.compact is None else state.compact
    made: dict[tuple[str, ...], Any] = {}
    if state.compact is None:
        stream = iter(state.statistics)
        for layer in range(model.config.num_layers):
            measured = next(stream, {})  # read first: pruned layers take the place of dense ones with it
            blocks = [model.config.block(layer, role) for role in "qkvougd"]
            made |= _quantise_blocks(model, blocks, measured if options.feedback else {}, grid)
            state.report("quantise", layer + 1, model.config.num_layers)
        plan = Plan((), model.config.blocks())
    else:
        assert model.plan is not None
        plan, measured = model.plan, {}
        if options.feedback:
            measured = {name: entry for layer in state.statistics for name, entry in layer.items()}
        blocks = [block for block in model.config.blocks() if block.name not in plan.group_of]
        made |= _quantise_blocks(model, blocks, measured, grid)
        for done, (name, states) in enumerate(_quantise_groups(model, plan.groups, measured, grid), start=1):
            made[("groups", name)] = states
            state.report("quantise", done, len(plan.groups))
    made |= _quantise_embeddings(state, model, options)
    groups = {path[1]: states for path, states in made.items() if path[0] == "groups"}
    flat = traverse_util.flatten_dict(dict(model.params))
    flat = {path: leaf for path, leaf in flat.items() if path[:2] not in made}
    flat |= {path: leaf for path, leaf in made.items() if path[0] != "groups"}
    params = traverse_util.unflatten_dict(flat)
    return dataclasses.replace(model, plan=plan, params={**params, "groups": groups} if groups else params)


def _quantise_embeddings(
    state: ConversionState, model: LanguageModel, options: Quantise
) -> dict[tuple[str, ...], QuantisedMatrix]:
    """The embedding and the unembedding by path, the latter with feedback in the geometry of final hidden states.

    A tied matrix is both. As an embedding its rows are read as they are, so that a share of the identity is added.
    """
    grid = Grid(options.embedding_bits, options.group_size, options.symmetric)
    tied = model.config.tied_embeddings
    moment = None
    if options.feedback and options.embedding_bits < 8:  # 8 bits are nearly exact anyway
        progress = partial(state.report, "embeddings")
        moment = measure_unembedding_input(model, state.calibration, progress=progress)
        if tied:
            moment += _EMBEDDING_SHARE * mean_diagonal(moment) * np.eye(len(moment))
    made: dict[tuple[str, ...], QuantisedMatrix] = {}
    for path in (("embed", "embedding"), ("unembed", "kernel")):
        if path[0] not in model.params:
            continue
        table = np.asarray(model.params[path[0]][path[1]], np.float32)
        if moment is None or not (tied or path[0] == "unembed"):
            made[path] = _placed(round_to_nearest(table, grid, search=True))
        else:
            made[path] = _placed(round_with_feedback(table, moment, grid))
    return made


def _quantise_blocks(
    model: LanguageModel, blocks: Sequence[Block], measured: Mapping[str, Statistics], grid: Grid
) -> dict[tuple[str, ...], QuantisedMatrix]:
    """Dense kernels by path; rounded to nearest where nothing is measured."""

    def one(block: Block) -> QuantisedMatrix:
        kernel = np.asarray(kernel_of(model.params, block.name), np.float32)
        _check_finite(kernel, block.name)
        if block.name not in measured:
            return round_to_nearest(kernel, grid)
        return round_with_feedback(kernel, _moment(measured[block.name], block.name), grid)

    costs = [float(block.d_out * block.d_in * block.d_in) for block in blocks]
    widths = [max(block.d_in, block.d_out) for block in blocks]
    found = thread_map(one, blocks, costs=costs, widths=widths)
    return {(*block.name.split("."), "kernel"): _placed(matrix) for block, matrix in zip(blocks, found, strict=True)}


def _quantise_groups(
    model: LanguageModel, groups: Sequence[GroupPlan], measured: Mapping[str, Statistics], grid: Grid
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The states of each group, in order."""

    def one(group: GroupPlan) -> dict[str, Any]:
        states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(model.params["groups"][group.name]))
        for part in (states["input_states"], *states["output_states"].values()):
            _check_finite(part, group.name)
        moments = [_moment(measured[m.name], m.name) for m in group.members if m.name in measured]
        if len(moments) < len(group.members) or group.kernel.name != "bilinear":
            return _nearest_states(states, grid)
        return quantise_states(group, states, moments, grid)

    costs = [float(group.rank * group.d_in * (group.rank + group.d_in)) for group in groups]
    widths = [max(group.d_in, *group.d_outs.values()) for group in groups]
    for group, states in zip(groups, thread_map(one, groups, costs=costs, widths=widths), strict=True):
        stored = model.params["groups"][group.name]
        own = {name: part for name, part in stored.items() if name not in states}  # a kernel's own parameters
        yield group.name, {**own, **jax.tree.map(jax.device_put, states)}


def _nearest_states(states: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    outputs = {name: round_to_nearest(q_JxR, grid) for name, q_JxR in states["output_states"].items()}
    return {"input_states": round_to_nearest(states["input_states"], grid, axis=0), "output_states": outputs}


def quantise_states(
    group: GroupPlan, states: Mapping[str, Any], second_moments: Sequence[np.ndarray], grid: Grid
) -> dict[str, Any]:
    """Quantise the states of a bilinear group, the output side knowing the rounded input side.

    Args:
        group: The group.
        states: In float64.
        second_moments: C of every member, (d_in, d_in).
        grid: What numbers are rounded to.

    Returns:
        The states, with a `QuantisedMatrix` in place of every array.
    """
    rest_OxR, outputs = states["input_states"], dict(states["output_states"])
    if group.pivots is None:
        # The lengths of a latent dimension's states on the two sides are arbitrary: output states, which share scales
        # across latent dimensions, get equal ones.
        length_R = np.sqrt(sum(np.square(q_JxR).sum(axis=0) for q_JxR in outputs.values()))
        length_R = np.where(length_R > 0, length_R, 1.0)
        rest_OxR, outputs = rest_OxR * length_R, {name: q_JxR / length_R for name, q_JxR in outputs.items()}
    others = np.arange(group.d_in) if group.pivots is None else other_neurons(group.pivots, group.d_in)
    pooled = np.mean([pad_square(moment, group.d_in) for moment in second_moments], axis=0)
    # What an error of the signal changes in the outputs of all members.
    of_signal = sum(q_JxR.T @ q_JxR for q_JxR in outputs.values())
    if len(others):
        small = round_with_feedback(rest_OxR, pooled[np.ix_(others, others)], grid, metric=of_signal, axis=0)
        rounded_OxR = np.asarray(small.dequantise(), np.float64)
    else:
        small = rounded_OxR = rest_OxR
    exact_IxR, rounded_IxR = (
        q if group.pivots is None else free_gauge(group.pivots, q, group.d_in) for q in (rest_OxR, rounded_OxR)
    )
    made = {}
    for member, moment in zip(group.members, second_moments, strict=True):
        reached = moment @ rounded_IxR[: member.d_in]
        signal_RxR = rounded_IxR[: member.d_in].T @ reached
        again = _refit(outputs[member.name], exact_IxR[: member.d_in].T @ reached, signal_RxR)
        made[member.name] = round_with_feedback(again, signal_RxR, grid)
    return {"input_states": small, "output_states": made}


def _refit(output_JxR: np.ndarray, cross_RxR: np.ndarray, signal_RxR: np.ndarray) -> np.ndarray:
    """Output states that read from the rounded signal what the given ones read from the exact one.

    Args:
        output_JxR: The given ones.
        cross_RxR: E[s s'^T] of the exact signal s and the rounded one s'.
        signal_RxR: E[s' s'^T].
    """
    ridge = max(RIDGE, 1e-6) * mean_diagonal(signal_RxR)
    change_RxR = scipy.linalg.solve(
        signal_RxR + ridge * np.eye(len(signal_RxR)), (cross_RxR - signal_RxR).T, assume_a="sym", check_finite=False
    ).T
    return output_JxR + output_JxR @ change_RxR


def _moment(entry: Statistics, name: str) -> np.ndarray:
    if not np.isfinite(entry.second_moment).all():
        raise UsageError(f"the statistics of {name} are not finite; load the model with --dtype float32")
    return entry.second_moment


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise UsageError(f"the weights of {name} are not finite; the file is damaged, download it again")


def _placed(matrix: QuantisedMatrix) -> QuantisedMatrix:
    """On the device."""
    return jax.device_put(matrix)
