"""From a dense model, a plan and calibration tokens to a compact model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from threadpoolctl import threadpool_limits

from ngc_jax.convert.gradients import measure_fisher
from ngc_jax.convert.methods import Method, States
from ngc_jax.convert.statistics import Statistics, calibrate
from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.load import LanguageModel, Params

Progress = Callable[[str, int, int], None]
SMALL_MATRIX = 4096


def convert(
    model: LanguageModel,
    plan: Plan,
    method: Method,
    tokens: np.ndarray,
    *,
    window: int = 1024,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> LanguageModel:
    """Convert a dense model to a compact one.

    A group is fitted as soon as the last of its members has been measured, and its statistics are dropped then: a
    topology within layers holds the statistics of one layer at a time.

    Args:
        model: The dense model.
        plan: What to build; bilinear groups.
        method: How the states are found.
        tokens: (T,) calibration tokens, one stream.
        window: Tokens in a calibration window.
        batch_size: Windows that run at once.
        progress: Called with (stage, done, in all).

    Returns:
        The compact model; parameters that no group replaces are shared with the dense one.

    Raises:
        UsageError: If the model is compact already, or calibration fails.
    """
    if model.plan is not None:
        raise UsageError(f"{model.name} is a compact model already; convert the dense model it was made from")
    report = progress or (lambda stage, done, total: None)
    states: dict[str, States] = {}
    measured: dict[str, Statistics] = {}
    waiting = list(plan.groups)

    def fit_ready(newly: Mapping[str, Statistics]) -> None:
        measured.update(newly)
        for group in list(waiting):
            if all(member.name in measured for member in group.members):
                statistics = [measured[member.name] for member in group.members]
                states[group.name] = fit(group, method, model.params, statistics)
                waiting.remove(group)
                report("fit", len(states), len(plan.groups))
        needed = {member.name for group in waiting for member in group.members}
        for name in [name for name in measured if name not in needed]:
            del measured[name]

    if method.needs == "nothing":
        for group in plan.groups:
            states[group.name] = fit(group, method, model.params, [])
            report("fit", len(states), len(plan.groups))
    else:
        fisher = None
        if method.needs == "gradients":
            fisher = measure_fisher(model, tokens, window=window, progress=lambda *a: report("gradients", *a))
        stream = calibrate(
            model.config,
            model.params,
            tokens,
            window=window,
            batch_size=batch_size,
            progress=lambda *a: report("calibrate", *a),
        )
        for _, statistics in stream:
            if fisher is not None:
                statistics = {n: dataclasses.replace(s, fisher=fisher[n]) for n, s in statistics.items()}
            fit_ready(statistics)
    return assemble(model, plan, states)


def fit(group: GroupPlan, method: Method, params: Params, statistics: Sequence[Statistics]) -> States:
    """Fit one group's states to its members' dense weights, in float64; no statistics for a method that needs none."""
    weights = [np.asarray(kernel_of(params, member.name), np.float64) for member in group.members]
    # BLAS threads wait for each other by spinning. On matrices of this size two gain little alone, and on a machine
    # that does anything else besides they cost tens of times more than one.
    small = max(max(weight.shape) for weight in weights) < SMALL_MATRIX
    with threadpool_limits(limits=1 if small else None, user_api="blas"):
        return method.factorise(weights, statistics, group.rank)


def kernel_of(params: Params, block: str) -> jax.Array:
    """The dense kernel (d_out, d_in) of a block."""
    node: Any = params
    for part in block.split("."):
        node = node[part]
    return node["kernel"]


def assemble(model: LanguageModel, plan: Plan, states: Mapping[str, States]) -> LanguageModel:
    """The compact model of fitted states: grouped kernels go, states come; all else is shared."""
    flat = traverse_util.flatten_dict(dict(model.params))
    for block in plan.group_of:
        del flat[(*block.split("."), "kernel")]
    params = traverse_util.unflatten_dict(flat)
    if plan.groups:
        params["groups"] = {group.name: _group_params(group, states[group.name], model.dtype) for group in plan.groups}
    return dataclasses.replace(model, plan=plan, params=params)


def _group_params(group: GroupPlan, states: States, dtype: jnp.dtype) -> dict[str, Any]:
    members: Sequence[str] = [member.name for member in group.members]
    outputs = zip(members, states.output_states, strict=True)
    return {
        "input_states": jnp.asarray(states.input_states.astype(dtype)),
        "output_states": {name: jnp.asarray(output.astype(dtype)) for name, output in outputs},
    }
