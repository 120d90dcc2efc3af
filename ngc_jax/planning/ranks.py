"""Ranks for the groups of a topology at a keep ratio."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import Block, GroupPlan
from ngc_jax.models.config import MLP_ROLES
from ngc_jax.planning.allocate import DENSE, Curve, allocate, rank_curve
from ngc_jax.planning.cache_budget import cached_layers, capped, check_cache_ratio, within_cache
from ngc_jax.planning.candidates import Candidate, Cell

# Second moments are means over tokens; SVD-LLM V2's losses are sums over its authors' calibration set, 256 x 2048.
_LOSS_TOKENS = 256 * 2048

Allocation = Literal["uniform", "neurons", "svd_llm_v2", "loss"]


@dataclasses.dataclass(frozen=True)
class RankRule:
    """How the ranks of all groups are chosen.

    Attributes:
        keep: Keep ratio of all groups together.
        allocation: `uniform` gives every group the same keep ratio, `neurons` leaves MLPs dense and gives all other
            groups the same keep ratio, `svd_llm_v2` distributes each role's budget over its layers by their losses,
            `loss` minimises the expected loss over all groups.
        gauge: Whether rank r stores r (M + I - r) in place of r (M + I) parameters.
        rank: Every group's rank, or "full", in place of a keep ratio.
        multiple: `loss` only: ranks are multiples of this, or the block is left dense.
        kernel: Of all groups; kernels other than bilinear get the largest rank that stores no more than bilinear.
        rounding: How a uniform rank is rounded to an integer.
        method: The method's name in error messages.
        dense: Whether every group is left dense.
        cache: Largest share of the key-value cache's numbers to keep; see `cache_budget`. None for no limit.
    """

    keep: float
    allocation: Allocation = "uniform"
    gauge: bool = False
    rank: int | Literal["full"] | None = None
    multiple: int = 1
    kernel: Kernel = dataclasses.field(default_factory=Kernel)
    rounding: Callable[[float], int] = math.floor
    method: str = "this method"
    dense: bool = False
    cache: float | None = None


def uniform_rank(
    members: Iterable[Block], keep: float, rounding: Callable[[float], int] = math.floor, gauge: bool = False
) -> int:
    """The rank at which a bilinear group stores `keep` of its members' parameters.

    With M outputs in total, I inputs, b biases and S = b + sum of d_out * d_in: r (M + I) + b = keep S; in a fixed
    gauge r (M + I - r) + b = keep S, of which r is the smaller root. At most the full rank.

    Args:
        members: The blocks of the group.
        keep: Stored over dense parameters.
        rounding: How the rank is rounded to an integer.
        gauge: Whether the gauge is fixed.

    Raises:
        UsageError: If rank 1 already exceeds the budget.
    """
    members = tuple(members)
    outputs, inputs = sum(block.d_out for block in members), max(block.d_in for block in members)
    wanted, both = keep * sum(block.parameters for block in members), outputs + inputs
    # Slightly larger, so that an integer root is not rounded down; a double root moves by the root of the excess.
    wanted = wanted * (1 + 1e-12) - sum(block.d_out for block in members if block.bias)
    exact = both / 2 - math.sqrt(max(both**2 / 4 - wanted, 0.0)) + 1e-9 if gauge else wanted / both
    rank = rounding(exact)
    if rank < 1:
        names = ", ".join(block.name for block in members)
        raise UsageError(
            f"keep ratio {keep:g} leaves no rank for {names}; raise it or leave these blocks out of the topology"
        )
    return min(rank, full_rank(members))


def _rank_one(members: Iterable[Block], gauge: bool, rounding: Callable[[float], int] = math.floor) -> float:
    """The least keep ratio at which `uniform_rank` gives rank 1, slightly larger against rounding down."""
    members = tuple(members)
    outputs, inputs = sum(block.d_out for block in members), max(block.d_in for block in members)
    least = 1.0 if rounding is math.floor else 0.5
    stored = least * (outputs + inputs - least * gauge) + sum(block.d_out for block in members if block.bias)
    return stored / sum(block.parameters for block in members) * (1 + 1e-9)


def full_rank(members: Iterable[Block]) -> int:
    """The rank at which a bilinear group reproduces its members exactly."""
    members = tuple(members)
    return min(sum(block.d_out for block in members), max(block.d_in for block in members))


def fitting_rank(group: Candidate, budget: float, kernel: Kernel, rank: int) -> int:
    """The largest rank up to `rank`, and at least 1, at which a group of this kernel stores at most `budget`."""
    limit = kernel.max_rank
    rank = rank if limit is None else min(rank, limit)
    while rank > 1 and GroupPlan(group.name, group.members, rank, kernel).count_parameters() > budget:
        rank -= 1
    return rank


def kernel_ranks(rule: RankRule, groups: Iterable[Candidate], ranks: Mapping[str, int]) -> dict[str, int]:
    """Replace ranks of bilinear groups by those at which the rule's kernel stores no more; fixed ranks are kept.

    Raises:
        UsageError: If the kernel does not admit a fixed rank.
    """
    kernel, found = rule.kernel, dict(ranks)
    if rule.kernel.name == "bilinear" or rule.rank is not None:
        return found
    for group in groups:
        rank = ranks.get(group.name, DENSE)
        if rank != DENSE:
            stored = GroupPlan(group.name, group.members, rank).count_parameters()
            found[group.name] = fitting_rank(group, stored, kernel, rank)
    return found


def given_ranks(rule: RankRule, groups: Sequence[Candidate]) -> dict[str, int]:
    """The ranks that are known before anything is fitted; empty if they are allocated by losses.

    Raises:
        UsageError: If a group is left without a rank.
    """
    if rule.dense:
        return {group.name: DENSE for group in groups}
    if rule.allocation not in ("uniform", "neurons"):
        return {}
    gauge, keep = rule.gauge, rule.keep
    dense = [group for group in groups if rule.allocation == "neurons" and _is_mlp(group)]
    others = sum(group.dense_parameters for group in groups if group not in dense)
    if dense and others:
        # The budget that the MLPs leave to the other groups.
        keep = min(max(1 - (1 - keep) * (1 + sum(group.dense_parameters for group in dense) / others), 0.0), 1.0)

    def rank(group: Candidate) -> int:
        full = full_rank(group.members)
        if rule.rank is not None:
            return full if rule.rank == "full" else min(rule.rank, full)
        if group in dense or (dense and keep == 1):
            return DENSE
        if rule.cache is not None and keep == 1 and not cached_layers(group):
            return DENSE
        return uniform_rank(group.members, keep, rule.rounding, gauge)

    ranks = {group.name: rank(group) for group in groups}
    return kernel_ranks(rule, groups, ranks if rule.cache is None else capped(rule.cache, groups, ranks))


def _is_mlp(group: Candidate) -> bool:
    return all(member.name.split(".")[3] in MLP_ROLES for member in group.members)


def check_budget(rule: RankRule, cells: Sequence[Cell]) -> None:
    """Refuse a keep ratio that no ranks reach, before anything is measured.

    Raises:
        UsageError: If a group is left without a rank, or the smallest ranks store too much, or keep too much of the
            cache.
    """
    if rule.cache is not None:
        check_cache_ratio(rule.cache, (group for cell in cells for group in cell[0]), rule.multiple)
    dense = sum(group.dense_parameters for cell in cells for group in cell[0])
    if rule.rank is None and (least := least_parameters(rule, cells)) > math.floor(rule.keep * dense):
        raise too_low(rule, least / dense)


def too_low(rule: RankRule, least: float) -> UsageError:
    """The error for a keep ratio below the least that a rule reaches."""
    bound = math.ceil(least * 1e4) / 1e4
    more = ", or lower the rank multiple" if rule.multiple > 1 else ""
    if bound > 1:
        return UsageError(
            f"method {rule.method} cannot make these groups smaller: rank 1 stores {least:.4g} times what they store "
            f"when dense; leave blocks out of the topology{more}"
        )
    return UsageError(
        f"keep ratio {rule.keep:g} is too low: the smallest ranks store {bound:g}; raise it to at least {bound:g}, or "
        f"leave blocks out of the topology{more}"
    )


def least_parameters(rule: RankRule, cells: Sequence[Cell], share: float = 0.0) -> int:
    """Number of parameters that the smallest ranks of a rule store; any budget from there on has ranks.

    Args:
        rule: Without a rank; its keep ratio does not matter.
        cells: Alternative groupings of the same blocks.
        share: If MLPs are left dense, a lower bound on the keep ratio of the others.
    """
    gauge, multiple = rule.gauge, rule.multiple
    if rule.dense:
        return sum(group.dense_parameters for cell in cells for group in cell[0])
    if rule.allocation == "loss":

        def least(group: Candidate) -> int:
            if multiple > full_rank(group.members):
                return group.dense_parameters
            stored = multiple * (group.outputs + group.inputs - (multiple if gauge else 0)) + group.biases
            return min(stored, group.dense_parameters)

        return sum(min(sum(map(least, way)) for way in cell) for cell in cells)
    groups = [group for cell in cells for group in cell[0]]
    mlps = [group for group in groups if rule.allocation == "neurons" and _is_mlp(group)]
    others = [group for group in groups if group not in mlps]
    # All others have one keep ratio, that of the group for which rank 1 costs most.
    rounding = rule.rounding if rule.allocation != "svd_llm_v2" else math.floor
    keep = max((_rank_one(group.members, gauge, rounding) for group in others), default=0.0)
    keep = max(keep, share) if mlps else keep
    return sum(group.dense_parameters for group in mlps) + math.ceil(
        keep * sum(group.dense_parameters for group in others)
    )


def _budget(rule: RankRule, cells: Sequence[Cell]) -> int:
    return math.floor(rule.keep * sum(group.dense_parameters for cell in cells for group in cell[0]))


def _curve(rule: RankRule, group: Candidate, energies: np.ndarray) -> Curve:
    return rank_curve(
        energies,
        group.outputs,
        group.inputs,
        group.dense_parameters,
        gauge=rule.gauge,
        biases=group.biases,
        multiple=rule.multiple,
        equal=rule.cache is not None and cached_layers(group) > 0,
    )


def choose_ranks(
    rule: RankRule, cells: Sequence[Cell], energies_of: Callable[[str], np.ndarray | None]
) -> dict[str, int]:
    """Choose ranks, and the best alternative of every cell, by the measured losses.

    Args:
        rule: Its keep ratio is the budget.
        cells: Alternative groupings of the same blocks.
        energies_of: Loss that each latent dimension of a group saves, by the group's name.

    Returns:
        Rank by group name, `DENSE` for a group whose members are left dense.

    Raises:
        UsageError: If the budget cannot be met, or a method has no energies.
    """

    def energies(group: Candidate) -> np.ndarray:
        found = energies_of(group.name)
        if found is None:
            raise UsageError(f"method {rule.method} gives no losses to allocate ranks by; use allocation uniform")
        return found

    if rule.allocation == "svd_llm_v2":
        groups = [group for ((group,),) in cells]
        shared = _share_by_role(rule, groups, {group.name: energies(group) for group in groups})
        return kernel_ranks(rule, groups, shared if rule.cache is None else capped(rule.cache, groups, shared))
    curves = [[[_curve(rule, group, energies(group)) for group in way] for way in cell] for cell in cells]
    ranks = {}
    choose = partial(allocate, budget=_budget(rule, cells))
    choices = choose(curves) if rule.cache is None else within_cache(rule.cache, cells, curves, choose)
    for cell, ways, (way, indices) in zip(cells, curves, choices, strict=True):
        for group, curve, index in zip(cell[way], ways[way], indices, strict=True):
            ranks[group.name] = int(curve.ranks[index])
    return kernel_ranks(rule, [group for cell in cells for way in cell for group in way], ranks)


def _share_by_role(rule: RankRule, groups: Sequence[Candidate], energies: Mapping[str, np.ndarray]) -> dict[str, int]:
    """SVD-LLM V2's heterogeneous compression ratios (arXiv 2503.12340, section 3.1, algorithm 1).

    Among the groups of a type (here: of the same roles), the share of parameters to remove is proportional to
    1 / log(loss), with the loss of truncation at the uniform ratio.
    """
    by_type: dict[str, list[Candidate]] = defaultdict(list)
    for group in groups:
        by_type[group.name.split("-", 1)[1].partition(".")[0]].append(group)
    ranks = {}
    for members in by_type.values():
        inverse = []
        for group in members:
            rank = uniform_rank(group.members, rule.keep, gauge=rule.gauge)
            # The authors' losses are Frobenius norms over all calibration tokens, far above e: this floor makes that
            # explicit.
            loss = math.sqrt(max(float(energies[group.name][rank:].sum()) * _LOSS_TOKENS, 0.0))
            inverse.append(1.0 / math.log(max(loss, math.e)))
        # A group must keep rank 1; what the others remove instead is distributed in the same proportions.
        least = [_rank_one(group.members, rule.gauge) for group in members]
        for group, kept in zip(members, _kept(inverse, least, rule.keep), strict=True):
            ranks[group.name] = DENSE if kept >= 1 else uniform_rank(group.members, kept, gauge=rule.gauge)
    return ranks


def _kept(weights: Sequence[float], least: Sequence[float], keep: float) -> list[float]:
    """Kept shares whose mean is `keep`: removed shares are proportional to the weights, none below its least."""

    def kept(factor: float) -> list[float]:
        return [max(1 - factor * weight, low) for weight, low in zip(weights, least, strict=True)]

    low, high = 0.0, 1 / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(kept(middle)) > keep * len(weights):
            low = middle
        else:
            high = middle
    return kept(high)
