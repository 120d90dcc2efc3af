"""Topologies: which blocks of a model form which group.

    >>> [group.members for group in expand(parse("qkk-qvv"), num_layers=2)][0]
    ('layers.0.attn.q', 'layers.0.attn.k', 'layers.1.attn.k')

In layers with mixtures of experts, u, g and d stand for every expert's own: `ug` is a group for each expert, `ug*` one
for all experts of a layer.

A letter that occurs n times in a section of the text has period n: its occurrences, from left to right, are n
successive layers, and the pattern repeats over the section's layers. Blocks that are not named are left dense.
Pure Python: nothing here imports an array library.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

from ngc_jax.errors import UsageError
from ngc_jax.groups.families import FAMILIES
from ngc_jax.groups.topology_text import (
    ALL_EXPERTS,
    ROLES,
    Bound,
    Section,
    Topology,
    TopologyError,
    format_topology,
    overlap_problem,
    parse,
    roles_of,
)

__all__ = [
    "ALL_EXPERTS",
    "FAMILIES",
    "ROLES",
    "Bound",
    "Section",
    "Topology",
    "TopologyError",
    "TopologyGroup",
    "describe",
    "expand",
    "format_topology",
    "parse",
    "spans_layers",
]


_MLP = "ugd"


@dataclasses.dataclass(frozen=True)
class TopologyGroup:
    """One group of a model.

    Attributes:
        name: `L<first layer>[_<last layer>]-<role of each member>`, for example `L0-qkv` or `L2_3-qq`; then
            `.<expert>`, or `*` for all experts.
        members: Block names in the order of the text, for example `layers.0.attn.q`.
    """

    name: str
    members: tuple[str, ...]


def expand(
    topology: Topology, num_layers: int, roles: str = ROLES, experts: Sequence[int] = ()
) -> tuple[TopologyGroup, ...]:
    """The groups of a model of `num_layers` layers, ordered by first layer, then as written.

    Where a period does not divide a range, the last groups have fewer members, and empty ones are dropped. Blocks in no
    group are left dense. Names are unique: of two groups with the same letters, one is later in all of them.

    Args:
        topology: The result of `parse`.
        num_layers: Depth of the model.
        roles: The roles that the model has.
        experts: By layer, the number of experts of its MLP, 0 for none; none anywhere if empty.

    Raises:
        TopologyError: If the topology names a role that the model lacks, a range does not fit its depth, or a group
            joins experts of different layers, or experts with attention, without `*`.
    """
    found: list[TopologyGroup] = []
    for members, mark in _memberships(topology, num_layers, roles):
        name = _group_name(members)
        numbers = {(layer, role): experts[layer] if experts and role in _MLP else 0 for layer, role in members}
        if not any(numbers.values()):
            found.append(TopologyGroup(name, tuple(_block_name(layer, role) for layer, role in members)))
        elif mark == ALL_EXPERTS:
            blocks = [
                _block_name(layer, role, expert)
                for layer, role in members
                for expert in (range(numbers[layer, role]) if numbers[layer, role] else (None,))
            ]
            found.append(TopologyGroup(name + ALL_EXPERTS, tuple(blocks)))
        else:
            if len({layer for layer, _ in members}) > 1 or not all(numbers.values()):
                letters = "".join(role for _, role in members)
                raise _error_at(
                    topology, 0, f"group {letters!r} joins an expert with another layer or with attention; add '*'"
                )
            for expert in range(experts[members[0][0]]):
                blocks = [_block_name(layer, role, expert) for layer, role in members]
                found.append(TopologyGroup(f"{name}.{expert}", tuple(blocks)))
    return tuple(found)


def describe(topology: Topology, num_layers: int, roles: str = ROLES) -> str:
    """A table of the sharing: each pattern once, with its layers and the number of groups it makes.

    A number after a role is the layer within the period, so `q0 q1` is a group of two successive layers.

    Raises:
        TopologyError: As `expand`.
    """
    dense = {role: list(range(num_layers)) for role in roles}
    for members, _ in _memberships(topology, num_layers, roles):
        for layer, role in members:
            dense[role].remove(layer)
    rows = [("layers", "share a latent space", "groups")]
    for section, layers in zip(topology.sections, _layer_ranges(topology, num_layers), strict=True):
        for period, members, mark in _patterns(section):
            count = len(layers[min(members)[0] :: period])
            if not count:
                continue
            short = any(offset >= len(layers) - period * (count - 1) for offset, _ in members)
            shared = " ".join(role + str(offset) * (period > 1) + mark for offset, role in members)
            rows.append((_layer_text(layers), shared, f"{count}{', the last cut short' * short}"))
    by_layers: defaultdict[str, list[str]] = defaultdict(list)
    for role in roles:
        by_layers[_layer_text(dense[role])].append(role)
    rows += [(layers, f"dense: {' '.join(names)}", "") for layers, names in by_layers.items() if layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def spans_layers(topology: Topology) -> bool:
    """Whether any group has members in several layers."""
    patterns = [members for section in topology.sections for _, members, _ in _patterns(section)]
    return any(len({layer for layer, _ in members}) > 1 for members in patterns)


def _patterns(section: Section) -> list[tuple[int, list[tuple[int, str]], str]]:
    """For each group its period, its members, (layer within the period, role), and what follows its letters."""
    periods = Counter("".join(map(roles_of, section.groups)))
    seen: Counter[str] = Counter()
    patterns = []
    for group in section.groups:
        members = []
        for role in (letters := roles_of(group)):
            members.append((seen[role], role))
            seen[role] += 1
        patterns.append((periods[group[0]], members, group.removeprefix(letters)))
    return patterns


def _memberships(topology: Topology, num_layers: int, roles: str) -> list[tuple[list[tuple[int, str]], str]]:
    """The members, (layer, role), of every group, and what follows its letters."""
    for index, section in enumerate(topology.sections):
        for role in "".join(map(roles_of, section.groups)):
            if role not in roles:
                problem = f"the model has no role {role!r}; its roles are {' '.join(roles)}"
                raise _error_at(topology, index, problem, role)
    found: list[tuple[int, int, list[tuple[int, str]], str]] = []
    for section, layers in zip(topology.sections, _layer_ranges(topology, num_layers), strict=True):
        for order, (period, pattern, mark) in enumerate(_patterns(section)):
            for base in range(layers.start, layers.stop, period):
                members = [(base + offset, role) for offset, role in pattern if base + offset < layers.stop]
                if members:
                    found.append((min(members)[0], order, members, mark))
    return [(members, mark) for _, _, members, mark in sorted(found)]


def _layer_ranges(topology: Topology, num_layers: int) -> list[range]:
    """The layers of every section; only a range in percent may be empty (in a shallow model)."""
    if num_layers < 1:
        raise UsageError(f"a model of {num_layers} layers has no groups; expected at least 1 layer")
    depth = f"a model of {num_layers} layers (0 to {num_layers - 1})"
    found: list[range] = []
    for index, section in enumerate(topology.sections):
        start = section.start.resolve(num_layers)
        stop = num_layers if section.stop is None else section.stop.resolve(num_layers)
        if not (0 <= start <= num_layers and 0 <= stop <= num_layers):
            raise _error_at(topology, index, f"range {section.range_text} reaches beyond {depth}")
        if start >= stop and not (section.start.percent or (section.stop and section.stop.percent)):
            raise _error_at(topology, index, f"range {section.range_text} covers nothing in {depth}")
        for other, covered in zip(topology.sections, found, strict=False):
            if max(start, covered.start) < min(stop, covered.stop):
                raise _error_at(topology, index, f"{overlap_problem(section, other)}, in {depth}")
        found.append(range(start, stop))
    return found


def _error_at(topology: Topology, index: int, problem: str, role: str | None = None) -> TopologyError:
    """An error at a section of the canonical text, or at the first place where the section names a role."""
    position = sum(len(f"{section}; ") for section in topology.sections[:index])
    text = str(topology)
    return TopologyError(problem, text, position if role is None else text.index(role, position))


def _group_name(members: list[tuple[int, str]]) -> str:
    first, last = min(members)[0], max(members)[0]
    layers = f"L{first}" if first == last else f"L{first}_{last}"
    return f"{layers}-{''.join(role for _, role in members)}"


def _block_name(layer: int, role: str, expert: int | None = None) -> str:
    name = f"layers.{layer}.{'mlp' if role in _MLP else 'attn'}.{role}"
    return name if expert is None else f"{name}.{expert}"


def _layer_text(layers: Sequence[int]) -> str:
    """For example `0-3 6 8-9`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer for layer in layers if layer + 1 not in layers]
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
