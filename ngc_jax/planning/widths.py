"""The number of hidden neurons that MLPs keep, from parameter counts alone."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.families import family_of
from ngc_jax.planning.candidates import Cell, candidate_cells, planned_blocks
from ngc_jax.planning.ranks import RankRule, least_parameters, too_low

# Widths are multiples of this, a TPU's tile, if the dense model's is.
_TILE = 128
# Widths in the form `dense`: whole blocks of GGUF's quantised types, which have 32 numbers.
_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Pruning:
    """The architecture and keep ratio after neuron pruning.

    Attributes:
        config: The architecture with pruned MLPs; the dense model's if nothing is pruned.
        keep: The keep ratio of the remaining blocks at which the whole model meets its own.
        removed: Number of pruned parameters of the grouped blocks.
    """

    config: DecoderConfig
    keep: float
    removed: int = 0


def hidden_width(config: DecoderConfig) -> int:
    """Hidden neurons of the MLPs that pruning narrows: of all, or of every expert where there are some."""
    return config.mlp_dim if config.experts is None else config.experts.width


def with_width(config: DecoderConfig, width: int) -> DecoderConfig:
    """The architecture with another number of these neurons, as its config.json says it."""
    if config.experts is None:
        return dataclasses.replace(config, mlp_dim=width)
    same_entry = family_of(config.architecture).expert_width == "intermediate_size"
    mlp_dim = width if same_entry else config.mlp_dim
    return dataclasses.replace(config, mlp_dim=mlp_dim, experts=dataclasses.replace(config.experts, width=width))


def pruned_blocks(config: DecoderConfig) -> set[str]:
    """Names of the blocks that pruning narrows: of all MLPs, or of all experts where there are some."""
    layers = [layer for layer in range(config.num_layers) if config.experts is None or config.is_sparse(layer)]
    return {b.name for layer in layers for b in config.layer_blocks(layer) if b.name.split(".")[2] == "mlp"}


def plan_pruning(
    config: DecoderConfig, topology: str, rule: RankRule | None, keep_neurons: float, *, flexible: bool = False
) -> Pruning:
    """Choose the number of hidden neurons of every MLP, and the keep ratio of the remaining blocks.

    Args:
        config: The dense model's.
        topology: Which blocks are grouped.
        rule: How ranks are chosen afterwards; its keep ratio refers to the dense model's blocks. None if nothing is
            factorised.
        keep_neurons: Share of hidden neurons to keep.
        flexible: Whether the share is a default: all neurons are kept where the topology leaves MLPs out, fewer where
            the smallest ranks need the room.

    Raises:
        UsageError: If the share is not flexible and the topology leaves MLPs out, the share leaves too little, or no
            share and no ranks reach the keep ratio.
    """
    blocks = planned_blocks(config, topology)
    dense = sum(block.parameters for block in blocks.values())
    if rule is None:
        tile = _tiles(hidden_width(config))[0]
        return _pruned(config, topology, max(round(keep_neurons * hidden_width(config) / tile), 1) * tile, dense)
    whole = pruned_blocks(config)
    if not whole <= blocks.keys():
        if not flexible or rule.allocation == "neurons":
            raise UsageError(
                "hidden neurons can be pruned where the topology has u, g and d of every layer; add them to it"
            )
        return Pruning(config, rule.keep)
    budget = math.floor(rule.keep * dense)
    mlp = sum(blocks[name].parameters for name in whole)
    if not flexible and dense - round((1 - keep_neurons) * mlp) < budget:
        raise UsageError(
            f"keep-neurons {keep_neurons:g} leaves less than keep ratio {rule.keep:g}; keep more hidden neurons"
        )
    width = _choose_width(config, topology, rule, keep_neurons, flexible=flexible, budget=budget)
    return _pruned(config, topology, width, budget, rule.keep)


def plan_dense(config: DecoderConfig, topology: str, keep: float, multiple: int | None = None) -> Pruning:
    """The largest width of all MLPs at which pruning alone meets the keep ratio.

    Args:
        config: The dense model's.
        topology: Which blocks the keep ratio counts.
        keep: Stored over dense parameters of these blocks.
        multiple: The width is a multiple of this; if None, of 32 or of the largest power of two below it that divides
            the dense model's width.

    Raises:
        UsageError: If the topology leaves MLPs out, the keep ratio is too low for a width, or the multiple is.
    """
    blocks = planned_blocks(config, topology)
    whole = pruned_blocks(config)
    if not whole <= blocks.keys():
        raise UsageError("form dense prunes hidden neurons; add u, g and d of every layer to the topology")
    multiple = math.gcd(hidden_width(config), _BLOCK) if multiple is None else multiple

    def stored(width: int) -> int:
        pruned = with_width(config, width)
        return sum(block.parameters for block in planned_blocks(pruned, topology).values())

    dense = stored(hidden_width(config))
    budget = math.floor(keep * dense)
    if dense <= budget:
        return Pruning(config, keep)
    neuron = stored(2) - stored(1)
    width = (budget - stored(1) + neuron) // neuron // multiple * multiple
    if width < 1:
        least = math.ceil(stored(multiple) / dense * 1e4) / 1e4
        raise UsageError(
            f"keep ratio {keep:g} is too low for form dense: attention is kept, and MLPs of {multiple} hidden neurons "
            f"bring the blocks to {least:g}; raise it to at least {least:g}, or choose form grouped"
        )
    return _pruned(config, topology, width, budget, keep)


def _pruned(config: DecoderConfig, topology: str, width: int, budget: int, keep: float = 1.0) -> Pruning:
    dense = sum(block.parameters for block in planned_blocks(config, topology).values())
    pruned = with_width(config, width)
    left = sum(block.parameters for block in planned_blocks(pruned, topology).values())
    return Pruning(pruned, min(budget / left, 1.0), dense - left) if left < dense else Pruning(config, keep)


def _choose_width(
    config: DecoderConfig, topology: str, rule: RankRule, keep_neurons: float, *, flexible: bool, budget: int
) -> int:
    """Number of hidden neurons of every MLP: a multiple of the tile near the share, within the budget.

    If the nearest multiple leaves less than the budget, the next larger one is taken if it is within the budget. Where
    the smallest ranks exceed the budget, fewer neurons are kept if the share is flexible, and the tile is halved until
    a width fits.

    Args:
        config: The dense model's.
        topology: With u, g and d of every layer.
        rule: Of the ranks.
        keep_neurons: The share.
        flexible: As for `plan_pruning`.
        budget: Parameters that the blocks of the topology may store.

    Raises:
        UsageError: If nothing fits into the budget.
    """

    def cells(width: int) -> tuple[Cell, ...]:
        return candidate_cells(with_width(config, width), topology)

    def fits(width: int, share: float) -> bool:
        return least_parameters(rule, cells(width), share) <= budget

    def left(width: int) -> int:
        return sum(group.dense_parameters for cell in cells(width) for group in cell[0])

    # Blocks outside dense MLPs get at least half their part of the budget, if some width allows it.
    shares = (rule.keep / 2, 0.0) if flexible else (0.0,)
    for share, tile in itertools.product(shares, _tiles(hidden_width(config))):
        width = max(round(keep_neurons * hidden_width(config) / tile), 1) * tile
        if fits(width, share):
            while left(width) < budget and fits(width + tile, share):
                width += tile
            return width
        if flexible:
            smaller = range(tile, width, tile)
            found = bisect.bisect_left(smaller, True, key=functools.partial(_exceeds, fits, share))
            if found:
                return smaller[found - 1]
    least = least_parameters(rule, cells(1 if flexible else width))
    raise too_low(rule, least / left(hidden_width(config)))


def _exceeds(fits: Callable[[int, float], bool], share: float, width: int) -> bool:
    return not fits(width, share)


def _tiles(size: int) -> list[int]:
    """The largest tile that divides a size, and its halves."""
    return [2**power for power in range(math.gcd(size, _TILE).bit_length() - 1, -1, -1)]
