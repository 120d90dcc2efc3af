"""From a dense model, a recipe and calibration tokens to a compact model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from threadpoolctl import threadpool_limits

from ngc_jax.convert.allocate import DENSE
from ngc_jax.convert.best_states import States
from ngc_jax.convert.candidates import Candidate, all_candidates, candidate_cells
from ngc_jax.convert.gradients import measure_fisher
from ngc_jax.convert.output_gradients import measure_output_gradients
from ngc_jax.convert.ranks import choose_ranks, full_rank, given_ranks
from ngc_jax.convert.recipe import Recipe
from ngc_jax.convert.spill import Fitted, Spill
from ngc_jax.convert.statistics import Statistics, calibrate
from ngc_jax.errors import UsageError
from ngc_jax.groups.gauge import fix_gauge
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.models.load import LanguageModel, Params

Progress = Callable[[str, int, int], None]
SMALL_MATRIX = 4096
GRADIENT_TOKENS = 24_576


def convert(
    model: LanguageModel,
    recipe: Recipe,
    tokens: np.ndarray,
    *,
    gradient_tokens: int = GRADIENT_TOKENS,
    layers_per_pass: int | None = None,
    window: int = 1024,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> LanguageModel:
    """Convert a dense model to a compact one: `measure`, then `fit_groups`.

    Args:
        model: The dense model.
        recipe: What to do.
        tokens: (T,) calibration tokens, one stream.
        gradient_tokens: How many of them, from the first, gradients are taken on.
        layers_per_pass: Layers whose gradient statistics are held at once; all if None.
        window: Tokens in a calibration window.
        batch_size: Windows that run at once.
        progress: Called with (stage, done, in all).

    Raises:
        UsageError: If the model is compact already, or calibration fails.
    """
    stream = measure(
        model,
        recipe,
        tokens,
        gradient_tokens=gradient_tokens,
        layers_per_pass=layers_per_pass,
        window=window,
        batch_size=batch_size,
        progress=progress,
    )
    return fit_groups(model, recipe, stream, progress=progress)


def measure(
    model: LanguageModel,
    recipe: Recipe,
    tokens: np.ndarray,
    *,
    gradient_tokens: int = GRADIENT_TOKENS,
    layers_per_pass: int | None = None,
    window: int = 1024,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Iterator[dict[str, Statistics]]:
    """What a recipe needs to know of every block, one layer at a time; arguments as for `convert`.

    Raises:
        UsageError: If the model is compact already, or there is nothing to measure.
    """
    if model.plan is not None:
        raise UsageError(f"{model.name} is a compact model already; convert the dense model it was made from")
    report = progress or (lambda stage, done, total: None)
    needs, config = recipe.definition.needs, model.config
    if needs == "nothing":
        return
    fisher = None
    if needs == "fisher":
        fisher = measure_fisher(model, tokens, window=window, progress=lambda *a: report("gradients", *a))
    stream = calibrate(
        config,
        model.params,
        tokens,
        window=window,
        batch_size=batch_size,
        progress=lambda *a: report("calibrate", *a),
    )
    gradients: dict[str, Any] = {}
    step = layers_per_pass or config.num_layers
    for layer, statistics in stream:
        if needs == "gradients" and layer % step == 0:
            gradients, _ = measure_output_gradients(
                config,
                model.params,
                tokens[:gradient_tokens],
                geometry=recipe.gradients,
                layers=range(layer, min(layer + step, config.num_layers)),
                window=window,
                batch_size=max(batch_size // 2, 1),
                progress=lambda *a: report("gradients", *a),
            )
        if fisher is not None:
            statistics = {n: dataclasses.replace(s, fisher=fisher[n]) for n, s in statistics.items()}
        if gradients:
            statistics = {n: dataclasses.replace(s, gradients=gradients.pop(n)) for n, s in statistics.items()}
        yield statistics


def fit_groups(
    model: LanguageModel,
    recipe: Recipe,
    stream: Iterable[Mapping[str, Statistics]],
    *,
    progress: Progress | None = None,
) -> LanguageModel:
    """The compact model of measured statistics.

    A group is fitted as soon as the last of its members has been measured, and its statistics are dropped then: a
    topology within layers holds the statistics of one layer at a time. States wait on disk while ranks are not known.

    Args:
        model: The dense model.
        recipe: What to do.
        stream: Statistics by block name, a few blocks at a time; from `measure`.
        progress: Called with (stage, done, in all).

    Returns:
        The compact model; parameters that no group replaces are shared with the dense one.

    Raises:
        UsageError: If the keep ratio cannot be reached.
    """
    report = progress or (lambda stage, done, total: None)
    cells = candidate_cells(model.config, recipe.resolved_topology)
    groups = all_candidates(cells)
    ranks = given_ranks(recipe, groups)
    with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
        spill = Spill(directory)
        measured: dict[str, Statistics] = {}
        again: dict[str, list[Statistics]] = {}
        waiting = list(groups)

        def fit_ready() -> None:
            for group in list(waiting):
                if recipe.definition.needs != "nothing" and any(m.name not in measured for m in group.members):
                    continue
                statistics = [measured[member.name] for member in group.members if member.name in measured]
                if not ranks and not _same_input(statistics):
                    again[group.name] = statistics  # not nested: fitted again when the rank is known
                spill.put(group.name, fit(group, recipe, model.params, statistics, ranks.get(group.name)))
                waiting.remove(group)
                report("fit", len(groups) - len(waiting), len(groups))
            needed = {member.name for group in waiting for member in group.members}
            for name in [name for name in measured if name not in needed]:
                del measured[name]

        for statistics in stream:
            measured.update(statistics)
            fit_ready()
        fit_ready()
        if not ranks:
            ranks = choose_ranks(recipe, cells, spill.energies)
            for done, group in enumerate(again_groups := [g for g in groups if ranks.get(g.name) and g.name in again]):
                spill.put(group.name, fit(group, recipe, model.params, again[group.name], ranks[group.name]))
                report("refine", done + 1, len(again_groups))
        chosen = [group for group in groups if group.name in ranks]
        return assemble(model, chosen, ranks, spill, gauge=recipe.resolved_gauge)


def _same_input(statistics: Sequence[Statistics]) -> bool:
    return len({id(entry.second_moment) for entry in statistics}) <= 1


def fit(
    group: Candidate, recipe: Recipe, params: Params, statistics: Sequence[Statistics], rank: int | None = None
) -> Fitted:
    """Fit one group's states to its members' dense weights, in float64.

    Args:
        group: The group.
        recipe: Its method fits.
        params: Dense parameters.
        statistics: Of each member; none for a method that needs none.
        rank: Full rank if None.

    Raises:
        UsageError: If weights or statistics are not finite.
    """
    weights = [np.asarray(kernel_of(params, member.name), np.float64) for member in group.members]
    for member, weight in zip(group.members, weights, strict=True):
        if not np.isfinite(weight).all():
            raise UsageError(f"the weights of {member.name} are not finite; the model is damaged: get it again")
    # BLAS threads wait for each other by spinning. On matrices of this size two gain little alone, and on a machine
    # that does anything else besides they cost tens of times more than one.
    small = max(max(weight.shape) for weight in weights) < SMALL_MATRIX
    rank = full_rank(group.members) if rank in (None, DENSE) else rank
    with threadpool_limits(limits=1 if small else None, user_api="blas"):
        states = recipe.definition.factorise(weights, statistics, rank)
    scale = None
    if statistics:
        power = np.zeros(group.inputs)
        for entry in statistics:
            diagonal = np.diag(entry.second_moment)
            power[: len(diagonal)] += np.maximum(diagonal, 0.0) / len(statistics)
        scale = np.sqrt(power)
    return Fitted(states, scale)


def kernel_of(params: Params, block: str) -> jax.Array:
    """The dense kernel (d_out, d_in) of a block."""
    node: Any = params
    for part in block.split("."):
        node = node[part]
    return node["kernel"]


def assemble(
    model: LanguageModel, groups: Sequence[Candidate], ranks: Mapping[str, int], spill: Spill, *, gauge: bool
) -> LanguageModel:
    """The compact model of fitted states: grouped kernels go, states come; all else is shared.

    Args:
        model: The dense model.
        groups: The chosen groups.
        ranks: Of each by name; `DENSE` leaves its members dense.
        spill: Their states, of that rank or nested.
        gauge: Fix the gauge: choose pivots, whose states are not stored.
    """
    plans: list[GroupPlan] = []
    states: dict[str, Any] = {}
    dense: list[Block] = []
    for group in groups:
        rank = ranks[group.name]
        if rank == DENSE:
            dense += group.members
            continue
        fitted = spill.get(group.name)
        found, pivots = fitted.states.truncated(rank), None
        if gauge:
            with threadpool_limits(limits=1, user_api="blas"):
                pivots, rest, outputs = fix_gauge(found.input_states, found.output_states, fitted.input_scale)
            found = States(rest, tuple(outputs))
        plans.append(GroupPlan(group.name, group.members, rank, pivots=pivots))
        states[group.name] = _group_params(group, found, model.dtype)
    plan = Plan(tuple(plans), tuple(dense))
    flat = traverse_util.flatten_dict(dict(model.params))
    for block in plan.group_of:
        del flat[(*block.split("."), "kernel")]
    params = traverse_util.unflatten_dict(flat)
    if plans:
        params["groups"] = states
    return dataclasses.replace(model, plan=plan, params=params)


def _group_params(group: Candidate, states: States, dtype: jnp.dtype) -> dict[str, Any]:
    outputs = zip(group.members, states.output_states, strict=True)
    return {
        "input_states": jnp.asarray(states.input_states.astype(dtype)),
        "output_states": {member.name: jnp.asarray(output.astype(dtype)) for member, output in outputs},
    }
