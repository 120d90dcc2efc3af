"""How many numbers the key-value cache keeps for each token, by rank, and how a budget of them limits ranks.

Where keys or values are read from a group's signal, the cache can keep the signal (`models.latent_cache`): r numbers
for each layer in which the group has k or v, whatever else it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.planning.allocate import DENSE, Choice, Curve
from ngc_jax.planning.candidates import Candidate

# Bounds of the logarithm of the price of a cached number, in nats per token, and steps of bisection between them.
_LOG_PRICES = (-60.0, 20.0)
_STEPS = 24


def cached_layers(group: Candidate) -> int:
    """Number of layers in which a group has k or v: what the cache keeps of it for each latent dimension."""
    return len({member.name.split(".")[1] for member in group.members if _is_cached(member.name)})


def cached_when_dense(group: Candidate) -> int:
    """Numbers that the cache keeps of a group's k and v when they are dense."""
    return sum(member.d_out for member in group.members if _is_cached(member.name))


def _is_cached(block: str) -> bool:
    return block.split(".")[3] in ("k", "v")


def cached_numbers(group: Candidate, rank: int) -> int:
    """Numbers that the cache keeps of a group at a rank, `DENSE` included."""
    dense = cached_when_dense(group)
    return dense if rank == DENSE else min(cached_layers(group) * rank, dense)


def check_cache_ratio(ratio: float, groups: Iterable[Candidate], least: int) -> None:
    """Refuse a cache ratio that no ranks reach, before anything is measured.

    Args:
        ratio: Kept over full numbers.
        groups: All groups.
        least: The smallest rank.

    Raises:
        UsageError: If no group has k or v, or the smallest ranks keep too much.
    """
    cached = [group for group in groups if cached_layers(group)]
    if not cached:
        raise UsageError("a cache ratio needs k and v in the topology; add them, or leave out the cache ratio")
    full = sum(map(cached_when_dense, cached))
    smallest = max(sum(cached_numbers(group, least) for group in cached) / full, 0.0)
    if smallest > ratio:
        raise UsageError(
            f"cache ratio {ratio:g} is too low: the smallest ranks keep {smallest:.4g} of the cache; raise it"
        )


def uniform_caps(ratio: float, groups: Iterable[Candidate]) -> dict[str, int]:
    """The same share of the cache for every group: its largest rank, by name, of groups that have k or v."""
    return {
        group.name: max(math.floor(ratio * cached_when_dense(group) / layers * (1 + 1e-12)), 1)
        for group in groups
        if (layers := cached_layers(group))
    }


def within_cache(
    ratio: float,
    cells: Sequence[Sequence[Sequence[Candidate]]],
    curves: Sequence[Sequence[Sequence[Curve]]],
    choose: Callable[[Sequence[Sequence[Sequence[Curve]]]], list[Choice]],
) -> list[Choice]:
    """Choices within a budget of parameters that also keep within a budget of cached numbers.

    A second Lagrange multiplier: every number that the cache keeps has a price, which is added to the losses. Bisection
    finds the smallest price at which the cache is within its budget.

    Args:
        ratio: Kept over full numbers of the cache.
        cells: Alternative groupings of the same blocks.
        curves: A curve for every group, in the same order.
        choose: Minimises the sum of losses within the budget of parameters; see `allocate.allocate`.

    Raises:
        UsageError: If no price is high enough.
    """
    full = sum(cached_when_dense(group) for cell in cells for group in cell[0])
    budget = math.floor(ratio * full * (1 + 1e-12))

    def at(price: float) -> list[Choice]:
        return choose(
            [
                [
                    [_priced(curve, group, price) for group, curve in zip(*both, strict=True)]
                    for both in zip(*all_, strict=True)
                ]
                for all_ in zip(cells, curves, strict=True)
            ]
        )

    def kept(choices: Sequence[Choice]) -> int:
        return sum(
            cached_numbers(group, int(curve.ranks[index]))
            for cell, ways, (way, indices) in zip(cells, curves, choices, strict=True)
            for group, curve, index in zip(cell[way], ways[way], indices, strict=True)
        )

    choices = at(0.0)
    if kept(choices) <= budget:
        return choices
    low, high = _LOG_PRICES
    choices = at(math.exp(high))
    if (least := kept(choices)) > budget:
        raise UsageError(
            f"cache ratio {ratio:g} is too low: at least {least / full:.4g} of the cache is kept; raise it"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        candidate = at(math.exp(middle))
        if kept(candidate) <= budget:
            high, choices = middle, candidate
        else:
            low = middle
        if kept(choices) == budget:
            break
    return choices


def _priced(curve: Curve, group: Candidate, price: float) -> Curve:
    if not price or not cached_layers(group):
        return curve
    numbers = np.array([cached_numbers(group, int(rank)) for rank in curve.ranks])
    return Curve(curve.ranks, curve.losses + price * numbers, curve.parameters)


def capped(ratio: float, groups: Iterable[Candidate], ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks that were chosen without the cache in mind, lowered to `uniform_caps`."""
    found = dict(ranks)
    for name, cap in uniform_caps(ratio, [group for group in groups if group.name in found]).items():
        found[name] = cap if found[name] == DENSE else min(found[name], cap)
    return found
