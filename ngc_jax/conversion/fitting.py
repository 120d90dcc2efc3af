"""Fit one group, and assemble the compact model from fitted groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngc_jax.conversion.closed_form import Factors
from ngc_jax.conversion.spill import Fitted
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.conversion.thread_map import thread_map
from ngc_jax.errors import UsageError
from ngc_jax.groups.gauge import fix_gauge
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.candidates import Candidate
from ngc_jax.planning.ranks import full_rank
from ngc_jax.types import Params

if TYPE_CHECKING:
    from ngc_jax.conversion.passes.factorise import Factorise


def fit_all(
    groups: Sequence[Candidate],
    factorise: Factorise,
    params: Params,
    statistics: Sequence[Sequence[Statistics]],
    ranks: Sequence[int | None],
) -> Iterator[Fitted]:
    """Fit the states of groups to their members' dense weights, in float64; small groups run in parallel.

    Args:
        groups: The groups.
        factorise: The factorisation and its options.
        params: Dense parameters.
        statistics: Of each group's members; empty for a method that needs none.
        ranks: Of each group; full rank if None.

    Returns:
        The states of each group, in order, as an iterator.

    Raises:
        UsageError: If weights or statistics are not finite.
    """
    return thread_map(
        lambda item: fit_group(item[0], factorise, params, item[1], item[2]),
        list(zip(groups, statistics, ranks, strict=True)),
        costs=[float(sum(m.d_out * m.d_in * (m.d_out + m.d_in) for m in group.members)) for group in groups],
        widths=_widths(groups),
    )


def _widths(groups: Sequence[Candidate]) -> list[int]:
    return [max(max(member.d_out, member.d_in) for member in group.members) for group in groups]


def fit_group(
    group: Candidate, factorise: Factorise, params: Params, statistics: Sequence[Statistics], rank: int | None
) -> Fitted:
    """The states of one group; arguments as for `fit_all`."""
    kernels = [np.asarray(kernel_of(params, member.name), np.float64) for member in group.members]
    for member, kernel in zip(group.members, kernels, strict=True):
        if not np.isfinite(kernel).all():
            raise UsageError(f"the weights of {member.name} are not finite; the file is damaged, download it again")
    for member, entry in zip(group.members, statistics, strict=bool(statistics)):
        if not _is_finite(entry):
            raise UsageError(f"the statistics of {member.name} are not finite; load the model with --dtype float32")
    statistics = shrunk(statistics, factorise.shrinkage)
    rank = full_rank(group.members) if rank in (None, DENSE) else rank
    states = factorise.definition.function(kernels, statistics, rank)
    scale = None
    if statistics:
        power = np.zeros(group.inputs)
        for entry in statistics:
            diagonal = np.diag(entry.second_moment)
            power[: len(diagonal)] += np.maximum(diagonal, 0.0) / len(statistics)
        scale = np.sqrt(power)
    return Fitted(states, scale)


def shrunk(statistics: Sequence[Statistics], shrinkage: float) -> list[Statistics]:
    """(1 - shrinkage) C + shrinkage diag(C) in place of C (Ledoit and Wolf 2004 shrink to a multiple of I).

    Blocks with the same input site share the result.
    """
    if not shrinkage:
        return list(statistics)
    by_site: dict[str, np.ndarray] = {}
    found = []
    for entry in statistics:
        moment = by_site.get(entry.site)
        if moment is None:
            moment = (1 - shrinkage) * entry.second_moment
            np.fill_diagonal(moment, np.diag(entry.second_moment))
            if entry.site:
                by_site[entry.site] = moment
        found.append(dataclasses.replace(entry, second_moment=moment))
    return found


def shrunk_in_place(layer: Mapping[str, Statistics], shrinkage: float) -> dict[str, Statistics]:
    """As `shrunk`, but in place in the given arrays, which blocks with the same input site share."""
    moments = {entry.site or name: entry.second_moment for name, entry in layer.items()}
    for moment in moments.values() if shrinkage else ():
        diagonal = np.diag(moment).copy()
        moment *= 1 - shrinkage
        np.fill_diagonal(moment, diagonal)
    return dict(layer)


def _is_finite(entry: Statistics) -> bool:
    found = [entry.second_moment, entry.absolute_mean, entry.fisher]
    if entry.gradients is not None:
        found += [entry.gradients.mean_square, entry.gradients.second_moment]
    return all(array is None or bool(np.isfinite(array).all()) for array in found)


def assemble(
    model: LanguageModel,
    groups: Sequence[Candidate],
    ranks: Mapping[str, int],
    states_of: Callable[[str], Fitted],
    *,
    gauge: bool,
    donate: bool = False,
    kernel: Kernel | None = None,
    params_of: Callable[[Candidate, Factors], dict[str, Any]] | None = None,
) -> LanguageModel:
    """The compact model of fitted states: states replace the grouped kernels, all other parameters are shared.

    Args:
        model: The dense model.
        groups: The chosen groups.
        ranks: By group name; `DENSE` leaves the members dense.
        states_of: Returns the fitted states of a group by its name, of that rank or nested.
        gauge: Fix the gauge: choose pivots, whose states are not stored.
        donate: Delete the dense kernels that states replace.
        kernel: Of all groups; bilinear if None.
        params_of: Computes a group's parameters from its bilinear states; None stores the states themselves.
    """

    def states(group: Candidate) -> tuple[Factors, tuple[int, ...] | None]:
        fitted = states_of(group.name)
        found = fitted.states.truncated(ranks[group.name])
        if not gauge:
            return found, None
        pivots, rest, outputs = fix_gauge(found.input_states, found.output_states, fitted.input_scale)
        return Factors(rest, tuple(outputs)), pivots

    kernel = kernel or Kernel()
    grouped = [group for group in groups if ranks[group.name] != DENSE]
    costs = [group.inputs * float(ranks[group.name]) ** 2 for group in grouped]
    found_states = thread_map(states, grouped, costs=costs, widths=_widths(grouped))
    plans: list[GroupPlan] = []
    made: dict[str, Any] = {}
    for group, (found, pivots) in zip(grouped, found_states, strict=True):
        plans.append(GroupPlan(group.name, group.members, ranks[group.name], kernel, pivots))
        made[group.name] = (
            _group_params(group, found, model.param_dtype) if params_of is None else params_of(group, found)
        )
        if donate:
            for member in group.members:
                if member.name.split(".")[-1].isdecimal():
                    continue  # of a stack of experts, which is replaced as a whole
                kernel_of(model.params, member.name).delete()
    dense = [member for group in groups if ranks[group.name] == DENSE for member in group.members]
    plan = Plan(tuple(plans), tuple(dense))
    params = without_kernels(model, plan)
    if plans:
        params["groups"] = made
    return dataclasses.replace(model, plan=plan, params=params)


def without_kernels(model: LanguageModel, plan: Plan) -> dict[str, Any]:
    """The parameters without the kernels of grouped blocks; of experts, the stacks of those that have no group."""
    flat = traverse_util.flatten_dict(dict(model.params))
    taken: dict[tuple[str, ...], set[int]] = {}
    for block in plan.group_of:
        *path, last = block.split(".")
        if last.isdecimal():
            taken.setdefault((*path, "kernel"), set()).add(int(last))
        else:
            del flat[(*path, last, "kernel")]
    for name, experts in taken.items():
        left = [expert for expert in range(len(flat[name])) if expert not in experts]
        if left:
            flat[name] = flat[name][np.asarray(left)]
        else:
            del flat[name]
    params: dict[str, Any] = traverse_util.unflatten_dict(flat)
    return params


def _group_params(group: Candidate, states: Factors, dtype: jnp.dtype) -> dict[str, Any]:
    outputs = zip(group.members, states.output_states, strict=True)
    # Not jnp.asarray, which compiles a program for every new shape, and every rank is a new shape.
    return {
        "input_states": jax.device_put(states.input_states.astype(dtype)),
        "output_states": {member.name: jax.device_put(output.astype(dtype)) for member, output in outputs},
    }
