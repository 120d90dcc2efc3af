"""Candidate groups: those of a topology or, for `auto`, all whose sharing may pay off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ngc_jax.groups.plan import Block
from ngc_jax.groups.topology import ALL_EXPERTS, Topology, expand, parse, spans_layers
from ngc_jax.groups.topology_text import EITHER, with_sharing
from ngc_jax.models.config import MLP_ROLES, ROLES, DecoderConfig

# The topology that is chosen together with the ranks, by the expected loss.
AUTO = "auto"
# For every set of roles, the ways in which two successive layers may share; the first shares nothing.
_WAYS = (("q-k-v", "qkv", "qq-kk-vv"), ("o", "oo"), ("u-g", "ug", "uu-gg"), ("d", "dd"))
# Of one layer with experts: blocks of one expert share or not, or those of all experts do.
_EXPERT_WAYS: tuple[tuple[str, ...], ...] = (("u-g", "ug", "u*-g*", "ug*"), ("d",))
_WITHOUT_GATE = (*_WAYS[:2], ("u", "uu"), _WAYS[3])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A possible group of the model, without a rank.

    Attributes:
        name: As in `topology.TopologyGroup`.
        members: Its blocks.
    """

    name: str
    members: tuple[Block, ...]

    @property
    def outputs(self) -> int:
        """Output neurons of all members."""
        return sum(member.d_out for member in self.members)

    @property
    def inputs(self) -> int:
        """Input neurons: the widest member's."""
        return max(member.d_in for member in self.members)

    @property
    def biases(self) -> int:
        """Parameters of the members' biases."""
        return sum(member.d_out for member in self.members if member.bias)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the members when dense, biases included."""
        return sum(member.parameters for member in self.members)


# Alternative groupings of the same blocks, each a set of groups.
Cell = tuple[tuple[Candidate, ...], ...]


def candidate_cells(config: DecoderConfig, topology: str) -> tuple[Cell, ...]:
    """The cells of a topology: one alternative each, or for `auto` private, same-input and adjacent-layer groups.

    Args:
        config: The decoder.
        topology: In the topology language, the name of a family, or `auto`.

    Raises:
        UsageError: If the topology does not parse or does not fit the decoder.
    """
    if topology != AUTO:
        parsed = parse(topology)
        if config.experts is None or EITHER not in topology:
            return tuple(((group,),) for group in _candidates(config, with_sharing(parsed, "")))
        return _cells_of_either(config, parsed)
    cells = []
    for start in range(0, config.num_layers, 2):
        stop = min(start + 2, config.num_layers)
        sparse = any(config.is_sparse(layer) for layer in range(start, stop))
        for ways in _WAYS if config.gated_mlp else _WITHOUT_GATE:
            if sparse and ways[0][0] in MLP_ROLES:
                continue
            cell = [tuple(_candidates(config, f"{start}:{stop}={way}")) for way in ways]
            # The last of an odd number of layers has no neighbour: two alternatives may be equal.
            cells.append(tuple(way for index, way in enumerate(cell) if way not in cell[:index]))
        for layer in range(start, stop) if sparse else ():
            for own_ways in _EXPERT_WAYS:
                cell = [tuple(_candidates(config, f"{layer}:{layer + 1}={way}")) for way in own_ways]
                names = [[group.members for group in way] for way in cell]
                cells.append(tuple(way for index, way in enumerate(cell) if names[index] not in names[:index]))
    return tuple(cells)


def _cells_of_either(config: DecoderConfig, topology: Topology) -> tuple[Cell, ...]:
    """The cells of a topology with `?`: private or shared by all experts, group by group."""
    private = {group.members: group for group in _candidates(config, with_sharing(topology, ""))}
    shared = _candidates(config, with_sharing(topology, ALL_EXPERTS))
    cells: list[Cell] = []
    for group in shared:
        own = tuple(other for members, other in private.items() if set(members) <= set(group.members))
        cells.append((own,) if own[0].members == group.members else (own, (group,)))
    return tuple(cells)


def may_span_layers(topology: str) -> bool:
    """Whether groups of a topology may have members in several layers."""
    return topology == AUTO or spans_layers(parse(topology))


def planned_blocks(config: DecoderConfig, topology: str) -> dict[str, Block]:
    """All blocks that a topology groups, by name."""
    groups = all_candidates(candidate_cells(config, topology))
    return {member.name: member for group in groups for member in group.members}


def all_candidates(cells: Iterable[Cell]) -> tuple[Candidate, ...]:
    """Every group of every alternative, each once."""
    return tuple(dict.fromkeys(group for cell in cells for way in cell for group in way))


def _candidates(config: DecoderConfig, topology: str | Topology) -> list[Candidate]:
    # Topologies are written for all roles; those that the decoder lacks are left out.
    blocks = {block.name: block for block in config.blocks()}
    parsed = parse(topology) if isinstance(topology, str) else topology
    experts = config.experts
    counts = () if experts is None else [experts.count * sparse for sparse in experts.layers]
    groups = expand(parsed, config.num_layers, roles=ROLES, experts=counts)
    found = [(group.name, [blocks[name] for name in group.members if name in blocks]) for group in groups]
    missing = {ord(role): None for role in ROLES if role not in config.roles}
    return [Candidate(name.translate(missing), tuple(members)) for name, members in found if members]
