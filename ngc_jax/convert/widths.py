"""How many hidden neurons the MLPs keep, by counting alone."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

from ngc_jax.convert.candidates import Cell, candidate_cells
from ngc_jax.convert.ranks import least_parameters, too_low
from ngc_jax.convert.recipe import Recipe
from ngc_jax.models.config import DecoderConfig

# Widths are multiples of this, a TPU's tile, if the dense model's is.
_TILE = 128


def choose_width(config: DecoderConfig, recipe: Recipe, budget: int) -> int:
    """How many hidden neurons every MLP keeps: a multiple of the tile near the recipe's share, within the budget.

    It is the next larger multiple where the nearest leaves less than the budget and the next is within it. Where the
    smallest ranks exceed the budget, fewer neurons are kept unless the recipe itself gives the width, and the tile is
    halved until something fits.

    Args:
        config: The dense model's.
        recipe: Its share of hidden neurons is below 1, and its topology has u, g and d of every layer.
        budget: Parameters that the blocks of the topology may store.

    Raises:
        UsageError: If nothing fits into the budget.
    """

    def cells(width: int) -> tuple[Cell, ...]:
        return candidate_cells(dataclasses.replace(config, mlp_dim=width), recipe.resolved_topology)

    def fits(width: int, share: float) -> bool:
        return least_parameters(recipe, cells(width), share) <= budget

    def left(width: int) -> int:
        return sum(group.dense_parameters for cell in cells(width) for group in cell[0])

    # Blocks outside dense MLPs get half their part of the budget at the least, if some width allows it.
    shares = (recipe.keep / 2, 0.0) if recipe.width is None else (0.0,)
    for share, tile in itertools.product(shares, _tiles(config.mlp_dim)):
        width = max(round(recipe.resolved_width * config.mlp_dim / tile), 1) * tile
        if fits(width, share):
            while left(width) < budget and fits(width + tile, share):
                width += tile
            return width
        if recipe.width is None:
            # Nobody asked for this width; fewer neurons leave room for the smallest ranks.
            smaller = range(tile, width, tile)
            found = bisect.bisect_left(smaller, True, key=functools.partial(_exceeds, fits, share))
            if found:
                return smaller[found - 1]
    least = least_parameters(recipe, cells(width if recipe.width is not None else 1))
    raise too_low(recipe.keep, least / left(config.mlp_dim), recipe)


def _exceeds(fits: Callable[[int, float], bool], share: float, width: int) -> bool:
    return not fits(width, share)


def _tiles(size: int) -> list[int]:
    """The largest tile that divides a size, and its halves."""
    return [2**power for power in range(math.gcd(size, _TILE).bit_length() - 1, -1, -1)]
