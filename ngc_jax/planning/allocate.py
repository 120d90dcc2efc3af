"""Ranks for many groups at once: one Lagrange multiplier over loss per stored parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Curve:
    """The trade-off of one group: ranks to choose from, with loss and stored parameters.

    Attributes:
        ranks: (K,) ascending; rank 0 leaves the members dense.
        losses: (K,) expected increase of the loss at each rank.
        parameters: (K,) stored at each rank.
    """

    ranks: np.ndarray
    losses: np.ndarray
    parameters: np.ndarray


DENSE = 0
# Relative to the largest: the rounding error of an energy of zero, or of a price. No energy counts as less, so that
# remaining budget is spent on directions that calibration never reached, and a full budget leaves everything dense.
_ROUNDING = 1e-12
# Alternative groupings of the same blocks, each with a curve for every group; one is chosen.
CurveCell = Sequence[Sequence[Curve]]
# The chosen alternative of a cell, and an index into the curve of each of its groups.
Choice = tuple[int, tuple[int, ...]]


def rank_curve(
    energies: np.ndarray,
    outputs: int,
    inputs: int,
    dense: int,
    *,
    gauge: bool,
    biases: int = 0,
    multiple: int = 1,
    equal: bool = False,
) -> Curve:
    """The curve of a group whose loss at rank r is the sum of the energies beyond the first r.

    Args:
        energies: (R,) loss that each latent dimension saves, in descending order.
        outputs: Output neurons of all members.
        inputs: Input neurons.
        dense: Parameters of the members when dense, biases included.
        gauge: Whether the gauge is fixed: rank r stores r (outputs + inputs - r) instead of r (outputs + inputs).
        biases: Parameters stored at every rank.
        multiple: Ranks are multiples of this (8 or 128 fill a TPU's tiles); dense members are always allowed.
        equal: Whether a rank that stores as much as dense members is worth something: it may have a smaller cache.
    """
    full = len(energies)
    ranks = np.arange(multiple, full + 1, multiple)
    energies = np.maximum(energies, _ROUNDING * max(float(np.max(energies)), 0.0))
    tails = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    stored = ranks * (outputs + inputs - (ranks if gauge else 0)) + biases
    worth = stored <= dense if equal else stored < dense
    return Curve(
        np.append(ranks[worth], DENSE),
        np.append(tails[ranks[worth]], 0.0),
        np.append(stored[worth], dense),
    )


def allocate(cells: Sequence[CurveCell], budget: int) -> list[Choice]:
    """Minimise the sum of losses over the choices of all cells, within a budget of stored parameters.

    At a multiplier every cell takes the choice with the least loss + multiplier * parameters; bisection finds the
    smallest multiplier that fits. That is the optimum over the convex hulls. The remaining budget is spent greedily, in
    descending order of gain per cost.

    Args:
        cells: Alternative groupings of the same blocks; a group without alternatives is a cell with a single curve.
        budget: Parameters that all cells may store together.

    Returns:
        For every cell the chosen alternative and, for each of its groups, an index into its curve.

    Raises:
        UsageError: If the budget is below the size of the smallest choices.
    """

    def at(multiplier: float) -> list[Choice]:
        return [_best_way(cell, multiplier) for cell in cells]

    def stored(choices: Sequence[Choice]) -> int:
        return sum(_parameters(cell, choice) for cell, choice in zip(cells, choices, strict=True))

    low, high = -100.0, 100.0
    choices = at(math.exp(high))
    if stored(choices) > budget:
        raise UsageError(
            f"the keep ratio leaves {budget:,} parameters, and these groups store at least {stored(choices):,}; "
            "raise it, leave blocks out of the topology, or lower the rank multiple"
        )
    for _ in range(80):
        middle = (low + high) / 2
        candidate = at(math.exp(middle))
        if stored(candidate) <= budget:
            high, choices = middle, candidate
        else:
            low = middle
    return _spend(cells, choices, budget - stored(choices))


def _best_way(cell: CurveCell, multiplier: float) -> Choice:
    ways = []
    for way in cell:
        prices = [curve.losses + multiplier * curve.parameters for curve in way]
        ways.append((sum(float(price.min()) for price in prices), tuple(int(price.argmin()) for price in prices)))
    least = min(price for price, _ in ways)
    # Alternatives of the same loss and size are often there: rounding must not choose between them.
    best = next(index for index, (price, _) in enumerate(ways) if price <= least + _ROUNDING * abs(least))
    return best, ways[best][1]


def _parameters(cell: CurveCell, choice: Choice) -> int:
    way, indices = choice
    return sum(int(curve.parameters[index]) for curve, index in zip(cell[way], indices, strict=True))


def _spend(cells: Sequence[CurveCell], choices: Sequence[Choice], left: int) -> list[Choice]:
    """Spend the remaining budget, one group's step at a time; the chosen alternative of each cell is kept."""
    curves = [curve for cell, (way, _) in zip(cells, choices, strict=True) for curve in cell[way]]
    taken = [index for _, indices in choices for index in indices]
    while True:
        best, step = 0.0, None
        for group, (curve, now) in enumerate(zip(curves, taken, strict=True)):
            cost = curve.parameters - curve.parameters[now]
            gain = curve.losses[now] - curve.losses
            ratio = np.where((cost > 0) & (cost <= left) & (gain > 0), gain / np.maximum(cost, 1), 0.0)
            if ratio.max() > best:
                best, step = float(ratio.max()), (group, int(ratio.argmax()))
        if step is None:
            break
        group, index = step
        left -= int(curves[group].parameters[index] - curves[group].parameters[taken[group]])
        taken[group] = index
    rest = iter(taken)
    return [(way, tuple(next(rest) for _ in indices)) for way, indices in choices]
