"""Error propagation: refit each layer on the inputs that the converted layers below it produce.

A block of the converted model reads x', not the dense model's x. Its best states then approximate not W on x, but
W x from x':

    E || G^(1/2) (W x - What x') ||^2 = || G^(1/2) (W R - What) C'^(1/2) ||^2 + const,
    C' = E[x' x'^T],    R = E[x x'^T] C'^-1

so that the fit uses W R in place of W and C' in place of C. How x' follows from x, x' = B x + rest, is measured on some
tokens and applied to C, which is known from more. Layers are refitted from the first to the last, as in SVD-LLM's
sequential update (arXiv 2403.07378, section 3.2) and in GPTQ (arXiv 2210.17323); ranks do not change.

Legend: K batches of a stack, B windows of a batch, L tokens, D width of the stream, T tokens in all, I inputs of a
block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ngc_jax.conversion.closed_form import Factors
from ngc_jax.conversion.fitting import assemble, fit_group
from ngc_jax.conversion.input_drift import carried_over, regression
from ngc_jax.conversion.remeasuring import dense_layer
from ngc_jax.conversion.spill import Fitted
from ngc_jax.conversion.state import ConversionState
from ngc_jax.conversion.statistics import Statistics, token_rows
from ngc_jax.conversion.symmetric_sums import add_products, mean_product, no_products
from ngc_jax.conversion.thread_map import thread_map
from ngc_jax.groups.gauge import free_gauge
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import MLP_ROLES, block_name
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
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.planning.candidates import Candidate, all_candidates, candidate_cells
from ngc_jax.types import Params

if TYPE_CHECKING:
    from ngc_jax.conversion.passes.factorise import Factorise


def propagate(state: ConversionState, factorise: Factorise, strength: float) -> LanguageModel:
    """Refit all groups, layer by layer, at their ranks.

    Within a layer, the inputs of all blocks are those that the previously converted layer computes from the output of
    the refitted layers below it.

    Args:
        state: With a compact model whose groups are each within one layer, and the statistics it was converted with, as
            a list of layers. If these have the first tokens apart, they give the dense inputs' second moment; else it
            is measured here. Where neurons were pruned, the inputs x are the original model's.
        factorise: The factorisation of the conversion.
        strength: How far targets and inputs are moved from the dense model's (0) to the converted one's (1).
    """
    model, compact, calibration = state.dense, state.compact, state.calibration
    assert compact is not None
    assert compact.plan is not None
    statistics = list(state.statistics)
    tokens = calibration.tokens[: calibration.propagation_tokens]
    mesh, config = calibration.mesh, model.config
    whole, all_kept = (model, None) if state.original is None else (state.original, state.kept)
    chosen = {group.name: group for group in all_candidates(candidate_cells(config, factorise.topology))}
    stacks = stack_batches(tokens, calibration.window, calibration.batch_size, mesh=mesh)
    decoders = [one.decoder.clone(dtype=None) for one in (whole, model)]
    ours = [embed(decoders[1], model.params, stack.tokens) for stack in stacks]
    theirs = list(ours)
    found: dict[str, Fitted] = {}
    for layer in range(config.num_layers):
        dense, once = whole.params["layers"][str(layer)], dense_layer(model, compact, layer)
        kept = None if all_kept is None else jnp.asarray(all_kept[layer])
        modules = layer_module(decoders[0], layer), layer_module(decoders[1], layer)
        own = _own_moments(layer, statistics[layer], len(tokens))
        # Experts are left as they are: which tokens they read depends on the routing, which is not propagated.
        roles = [role for role in config.roles if not (config.is_sparse(layer) and role in MLP_ROLES)]
        widths = {INPUT_SITE[role]: config.block(layer, role).d_in for role in roles}
        sums = {site: _no_sums(width, site in own) for site, width in widths.items()}
        for index, stack in enumerate(stacks):
            theirs[index], sums = _add_both(
                (dense, once, kept), (theirs[index], ours[index]), stack, sums, layers=modules, mesh=mesh
            )
        moments = {site: _moments(sums.pop(site), len(tokens), own.get(site)) for site in list(sums)}
        own_groups = [plan for plan in compact.plan.groups if plan.members[0].name in statistics[layer]]
        here = [plan for plan in own_groups if all(member.name.split(".")[-1] in roles for member in plan.members)]
        found |= {plan.name: _as_fitted(compact, plan, statistics[layer]) for plan in own_groups if plan not in here}
        refits = [(chosen[plan.name], plan.rank) for plan in here]
        found |= _refit(model, (factorise, strength), layer, statistics[layer], moments, refits)
        new = _with_states(
            once, {plan.name: (plan.members, found[plan.name].states) for plan in here}, model.param_dtype
        )
        for index, stack in enumerate(stacks):
            ours[index] = run_stack(new, ours[index], stack.positions, layer=modules[1], mesh=mesh)
        state.report("propagate", layer + 1, config.num_layers)
    groups = [chosen[plan.name] for plan in compact.plan.groups]
    ranks = {plan.name: plan.rank for plan in compact.plan.groups}
    made = assemble(model, groups, ranks, found.__getitem__, gauge=factorise.gauge, donate=state.donate and state.last)
    assert made.plan is not None
    return dataclasses.replace(made, plan=Plan(made.plan.groups, compact.plan.dense))


def _as_fitted(compact: LanguageModel, plan: GroupPlan, statistics: Mapping[str, Statistics]) -> Fitted:
    """The states of a group that is not refitted."""
    states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compact.params["groups"][plan.name])
    inputs = states["input_states"]
    if plan.pivots is not None:
        inputs = free_gauge(plan.pivots, inputs, plan.d_in)
    power = np.zeros(plan.d_in)
    for member in plan.members:
        power[: member.d_in] += np.maximum(np.diag(statistics[member.name].second_moment), 0.0) / len(plan.members)
    return Fitted(Factors(inputs, tuple(states["output_states"][m.name] for m in plan.members)), np.sqrt(power))


def _refit(
    model: LanguageModel,
    how: tuple[Factorise, float],
    layer: int,
    statistics: Mapping[str, Statistics],
    moments: Mapping[str, Sequence[np.ndarray]],
    groups: Sequence[tuple[Candidate, int]],
) -> dict[str, Fitted]:
    """Fit the groups of a layer to their new targets; groups with different inputs run in parallel.

    Args:
        model: The dense model.
        how: The factorisation, and the strength.
        layer: The layer's number.
        statistics: Of its blocks, by name.
        moments: By site: E[x x^T], E[x x'^T] and E[x' x'^T] of some tokens.
        groups: With their ranks.
    """
    factorise, strength = how

    def fit(unit: tuple[set[str], list[tuple[Candidate, int]]]) -> dict[str, Fitted]:
        sites, members = unit
        targets: dict[tuple[str, ...], np.ndarray] = {}
        moved: dict[str, Statistics] = {}
        for site in sites:
            for name, (target, entry) in _moved(model, layer, site, statistics, moments[site], strength).items():
                targets[(*name.split("."), "kernel")], moved[name] = target, entry
        params = traverse_util.unflatten_dict(targets)
        return {
            group.name: fit_group(group, factorise, params, [moved[member.name] for member in group.members], rank)
            for group, rank in members
        }

    units = _by_input(groups)
    widest = [max(len(moments[site][0]) for site in sites) for sites, _ in units]
    outputs = [max(member.d_out for group, _ in some for member in group.members) for _, some in units]
    fitted = thread_map(
        fit,
        units,
        costs=[float(width) ** 3 for width in widest],
        widths=[max(both) for both in zip(widest, outputs, strict=True)],
    )
    return {name: states for unit in fitted for name, states in unit.items()}


def _by_input(groups: Sequence[tuple[Candidate, int]]) -> list[tuple[set[str], list[tuple[Candidate, int]]]]:
    """Sites and the groups that read them, split where no group reads both."""
    units: list[tuple[set[str], list[tuple[Candidate, int]]]] = []
    for group, rank in groups:
        sites = {INPUT_SITE[member.name.split(".")[-1]] for member in group.members}
        joined, some = set(sites), [(group, rank)]
        for unit in [unit for unit in units if unit[0] & sites]:
            units.remove(unit)
            joined, some = joined | unit[0], unit[1] + some
        units.append((joined, some))
    return units


def _moved(
    model: LanguageModel,
    layer: int,
    site: str,
    statistics: Mapping[str, Statistics],
    moments: Sequence[np.ndarray],
    share: float,
) -> dict[str, tuple[np.ndarray, Statistics]]:
    """The target weights of the blocks of a site, and their statistics, by block name.

    Args:
        model: The dense model.
        layer: The layer's number.
        site: Where the blocks read.
        statistics: Of the layer's blocks.
        moments: E[x x^T], E[x x'^T] and E[x' x'^T] of some tokens.
        share: How far to move from the dense model's (0) to the converted one's (1).
    """
    names = [block_name(layer, role) for role in model.config.roles if INPUT_SITE[role] == site]
    weights = [np.asarray(kernel_of(model.params, name), np.float64) for name in names]
    dense_moment = statistics[names[0]].second_moment
    total, cross = carried_over(dense_moment, *moments)
    # Blocks with the same input share one array, and are recognised by it.
    moment = (1 - share) * dense_moment + share * total
    towards = None
    if sum(len(weight) for weight in weights) > len(total):
        towards = share * regression(total, cross)
        towards[np.diag_indices_from(towards)] += 1 - share
    found = {}
    for name, weight in zip(names, weights, strict=True):
        gradients = statistics[name].gradients
        metric = None if gradients is None else gradients.second_moment
        if towards is None:
            target = (1 - share) * weight + share * regression(total, cross, weight)
        else:
            target = weight @ towards
            if gradients is not None and metric is not None and len(metric) != len(weight):
                # W^T G W was measured; (W R)^T G (W R) is wanted.
                gradients = dataclasses.replace(gradients, second_moment=towards.T @ metric @ towards)
        found[name] = target, dataclasses.replace(statistics[name], second_moment=moment, gradients=gradients)
    return found


# E[x x^T], E[x x'^T] and E[x' x'^T] of a site, times the number of tokens; None for the first if it is known.
_Sums = tuple[tuple[Compensated, ...], Compensated, tuple[Compensated, ...]]


def _own_moments(layer: int, statistics: Mapping[str, Statistics], count: int) -> dict[str, np.ndarray]:
    """E[x x^T] of the first `count` tokens by site, where it was measured."""
    names = {block_name(layer, role): site for role, site in INPUT_SITE.items()}
    entries = {site: statistics[name].first for name, site in names.items() if name in statistics}
    return {site: first.second_moment for site, first in entries.items() if first is not None and first.count == count}


def _no_sums(width: int, own_known: bool) -> _Sums:
    return (
        () if own_known else no_products(width),
        Compensated.zeros_like(jnp.zeros((width, width))),
        no_products(width),
    )


def _moments(sums: _Sums, count: int, known: np.ndarray | None) -> list[np.ndarray]:
    own, cross, converted = sums
    mean = mean_product(own, count) if known is None else known.astype(np.float64)
    return [mean, cross.value() / count, mean_product(converted, count)]


@partial(jax.jit, static_argnames=("layers", "mesh"), donate_argnames=("sums",))
def _add_both(
    params: tuple[Params, Params, Int[Array, " S"] | None],
    streams: tuple[Float[Array, "K B L D"], Float[Array, "K B L D"]],
    stack: Stack,
    sums: dict[str, _Sums],
    *,
    layers: tuple[DecoderLayer, DecoderLayer],
    mesh: Mesh | None,
) -> tuple[Array, dict[str, _Sums]]:
    """Run a layer of both models on a stack; returns the dense model's residual streams after it and the sums.

    `params` has those of both models, and which hidden neurons of the dense model the other one keeps; None for all.
    """

    def step(
        params: tuple[Params, Params, Array | None], data: Mapping[str, Any], theirs: Array, sums: dict[str, _Sums]
    ) -> tuple[Array, dict[str, _Sums]]:
        dense, compact, kept = params
        after, at_theirs = Layer(layers[0], dense).read(theirs, data["positions"])
        _, at_ours = Layer(layers[1], compact).read(data["ours"], data["positions"])
        new: dict[str, _Sums] = {}
        for site in sums:
            x, y = at_theirs[site], at_ours[site]
            x = x if kept is None or site != INPUT_SITE["d"] else x[..., kept]
            x, y = (token_rows(inputs, data["mask"]) for inputs in (x, y))
            own, cross, converted = sums[site]
            both = jnp.einsum("ti,tj->ij", x, y, precision="highest")
            own = add_products(own, x) if own else own
            new[site] = (own, cross.add(both), add_products(converted, y))
        return after, new

    theirs, ours = streams
    data = {"positions": stack.positions, "mask": stack.mask, "ours": ours}
    return each_batch(step, params, data, theirs, sums, mesh=mesh)


def _with_states(layer: Params, groups: Mapping[str, tuple[Any, Factors]], dtype: jnp.dtype) -> Params:
    """A layer whose grouped kernels are formed from these states."""
    flat = traverse_util.flatten_dict(dict(layer))
    for members, states in groups.values():
        for member, weight in zip(members, states.weights(), strict=True):
            flat[(*member.name.split(".")[2:], "kernel")] = jnp.asarray(weight[:, : member.d_in].astype(dtype))
    return traverse_util.unflatten_dict(flat)
