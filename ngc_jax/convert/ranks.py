"""Ranks for the groups of a topology at a keep ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.groups.topology import expand, parse
from ngc_jax.models.config import ROLES, DecoderConfig


def check_keep_ratio(keep: float) -> float:
    """Raises UsageError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise UsageError(f"keep ratio {keep:g} is outside (0, 1]; 0.8 keeps 80 % of the parameters")
    return keep


def uniform_rank(members: Iterable[Block], keep: float, rounding: Callable[[float], int] = math.floor) -> int:
    """The rank at which a bilinear group stores `keep` of its members' weights.

    rank = rounding(keep * sum of d_out * d_in / (sum of d_out + max d_in)), at most the full rank.

    Args:
        members: The blocks of the group.
        keep: Stored over dense parameters.
        rounding: How the rank is made whole.

    Raises:
        UsageError: If not even rank 1 fits.
    """
    members = tuple(members)
    outputs, inputs = sum(block.d_out for block in members), max(block.d_in for block in members)
    rank = rounding(keep * sum(block.d_out * block.d_in for block in members) / (outputs + inputs))
    if rank < 1:
        names = ", ".join(block.name for block in members)
        raise UsageError(
            f"keep ratio {keep:g} leaves no rank for {names}; raise it or leave these blocks out of the topology"
        )
    return min(rank, full_rank(members))


def full_rank(members: Iterable[Block]) -> int:
    """The rank at which a bilinear group reproduces its members exactly."""
    members = tuple(members)
    return min(sum(block.d_out for block in members), max(block.d_in for block in members))


def plan_groups(config: DecoderConfig, topology: str, rank: Callable[[tuple[Block, ...]], int]) -> Plan:
    """A plan with the groups of a topology.

    Args:
        config: The decoder.
        topology: In the topology language, or the name of a family.
        rank: Gives a group's rank from its members.

    Raises:
        UsageError: If the topology does not parse or does not fit the decoder.
    """
    blocks = {block.name: block for block in config.blocks()}
    groups = []
    for group in expand(parse(topology), config.num_layers, roles=ROLES):
        members = tuple(blocks[name] for name in group.members)
        groups.append(GroupPlan(group.name, members, rank(members)))
    return Plan(tuple(groups))
