"""The text form of a topology: its grammar, parser and errors.

    topology = section { ";" section }
    section  = [ [ bound ] ":" [ bound ] "=" ] item { "-" item }
    bound    = layer | "-" layer | percent "%"
    item     = role { role } [ "*" | "?" ] | "hybrid1" ... "hybrid5"
    role     = "q" | "k" | "v" | "o" | "u" | "g" | "d"

In layers with mixtures of experts, the roles of an MLP are each expert's own; * joins all experts of a layer, and ?
leaves that to the expected loss. Elsewhere both have no effect.

`topology` defines the meaning of the text for a model of a given depth; import from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

from ngc_jax.errors import UsageError
from ngc_jax.groups.families import HYBRIDS

ROLES = "qkvougd"
"""The roles of a decoder layer: attention q, k, v, o; MLP u(p), g(ate), d(own)."""
ALL_EXPERTS, EITHER = "*", "?"
"""After a group: it has all experts of a layer as members; or whichever of both the expected loss prefers."""

# Few enough digits that int() and Decimal are exact and fast.
_BOUND = re.compile(r"(?P<layer>-?[0-9]{1,6})|(?P<percent>[0-9]{1,6}(\.[0-9]{1,6})?)\s*%")


class TopologyError(UsageError):
    """A topology text that cannot be read, or that does not fit the model.

    Attributes:
        text: The text at fault.
        position: Index into `text` of the character at fault; `len(text)` when the end is missing something.
    """

    def __init__(self, problem: str, text: str, position: int) -> None:
        super().__init__(problem, text, position)
        self.problem, self.text, self.position = problem, text, position

    def __str__(self) -> str:
        summary = f"topology, character {self.position + 1}: {self.problem}"
        line = re.sub(r"\s", " ", self.text)  # tabs and line breaks would displace the caret
        return f"{summary}\n    {line}\n    {' ' * self.position}^" if line.strip() else summary


@dataclasses.dataclass(frozen=True)
class Bound:
    """One end of a range: a layer, a layer counted from the end (negative), or a percentage of the depth."""

    value: int | Decimal
    percent: bool = False

    def resolve(self, num_layers: int) -> int:
        """The layer in a model of `num_layers`; a percentage is rounded to the nearest, of two the earlier."""
        if self.percent:
            return math.ceil((self.value * num_layers - 50) / 100)
        return int(self.value) + (num_layers if self.value < 0 else 0)

    def __str__(self) -> str:
        return f"{Decimal(self.value).normalize():f}%" if self.percent else str(self.value)


_FIRST = Bound(0)


@dataclasses.dataclass(frozen=True)
class Section:
    """Groups that repeat over the layers from `start` to before `stop` (None: to the last layer)."""

    groups: tuple[str, ...]
    start: Bound = _FIRST
    stop: Bound | None = None

    @property
    def range_text(self) -> str:
        """The range as canonical text, empty for all layers."""
        if self.start == _FIRST and self.stop is None:
            return ""
        return f"{self.start}:{'' if self.stop is None else self.stop}"

    def __str__(self) -> str:
        return f"{self.range_text}=" * bool(self.range_text) + "-".join(self.groups)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed topology. `parse` makes it and guarantees that it is well formed; `str` gives canonical text."""

    sections: tuple[Section, ...]

    @property
    def roles(self) -> str:
        """The roles that any section names, in the order of `ROLES`."""
        named = {role for section in self.sections for group in section.groups for role in group}
        return "".join(role for role in ROLES if role in named)

    def __str__(self) -> str:
        return "; ".join(map(str, self.sections))


def format_topology(topology: Topology) -> str:
    """Canonical text: `parse(format_topology(t)) == t`; names of families are expanded."""
    return str(topology)


def parse(text: str) -> Topology:
    """Read a topology, for example `qkv-o-ug-d`, `0:50%=kk-qv; 50%:=qq-kk-vv` or `hybrid3-ug-d`.

    White space around groups, bounds and separators is ignored.

    Raises:
        TopologyError: If the text is not a topology, a group joins roles of different period, or ranges are
            reversed or overlap. The message shows the position.
    """
    if not text.strip():
        raise TopologyError("the text is empty; expected groups such as 'qkv-o-ug-d'", text, 0)
    sections: list[Section] = []
    for begin, end in _split(text, 0, len(text), ";"):
        for section in _parse_section(text, begin, end):
            for other in sections:
                if _before(section.start, other.stop) and _before(other.start, section.stop):
                    raise TopologyError(overlap_problem(section, other), text, begin)
            sections.append(section)
    return Topology(tuple(sections))


def roles_of(group: str) -> str:
    """The letters of a group, without what follows them."""
    return group.rstrip(ALL_EXPERTS + EITHER)


def with_sharing(topology: Topology, mark: str) -> Topology:
    """The topology with `mark`, `ALL_EXPERTS` or nothing, in place of every `EITHER`."""
    sections = [
        dataclasses.replace(section, groups=tuple(group.replace(EITHER, mark) for group in section.groups))
        for section in topology.sections
    ]
    return Topology(tuple(sections))


def _split(text: str, begin: int, end: int, separator: str) -> Iterator[tuple[int, int]]:
    """Spans between separators, without surrounding white space; an empty span marks missing text."""
    for piece in text[begin:end].split(separator):
        left = begin + len(piece) - len(piece.lstrip())
        yield left, left + len(piece.strip())
        begin += len(piece) + 1


def _parse_section(text: str, begin: int, end: int) -> list[Section]:
    """One section; several where the family that it names has several."""
    ranges: list[tuple[Bound, Bound | None]] = [(_FIRST, None)]
    equals = text.find("=", begin, end)
    if equals >= 0:
        ranges = [_parse_range(text, *next(_split(text, begin, equals, ";")))]
        begin = equals + 1
    elif (colon := text.find(":", begin, end)) >= 0:
        problem = "a range without '='; expected start:end=groups such as '0:15=kk-qv'"
        raise TopologyError(problem, text, colon)
    found: list[list[tuple[str, int]]] = [[]]  # for each range its groups, and the position of each
    for left, right in _split(text, begin, end, "-"):
        word = text[left:right]
        if word not in HYBRIDS:
            _check_group(text, left, right)
        parts = parse(HYBRIDS[word]).sections if word in HYBRIDS else (Section((word,)),)
        if len(parts) > 1:
            if ranges != [(_FIRST, None)]:
                problem = f"{word} has ranges of its own; it can be joined to groups only"
                raise TopologyError(problem, text, left)
            ranges = [(part.start, part.stop) for part in parts]
            found = [list(found[0]) for _ in parts]
        for index, groups in enumerate(found):
            groups.extend((group, left) for group in parts[index % len(parts)].groups)
    for groups in found:
        _check_periods(text, groups)
    return [
        Section(tuple(group for group, _ in groups), start, stop)
        for groups, (start, stop) in zip(found, ranges, strict=True)
    ]


def _check_group(text: str, begin: int, end: int) -> None:
    word = text[begin:end]
    if len(word) > 1 and word[-1] in (ALL_EXPERTS, EITHER):
        word, end = word[:-1], end - 1
    if not word:
        raise TopologyError(f"a group is missing; expected letters of {' '.join(ROLES)}", text, begin)
    position, letter = next(((at, a) for at, a in enumerate(word, begin) if a not in ROLES), (end, ""))
    if not letter:
        return
    families = difflib.get_close_matches(word.lower(), HYBRIDS, n=len(HYBRIDS))
    if families:
        likely = [f"did you mean {name!r}?" for name in families if name[-1] == word[-1]]
        hint = likely[0] if likely else f"expected one of {' '.join(HYBRIDS)}"
        raise TopologyError(f"unknown family {word!r}; {hint}", text, begin)
    expected = f"expected one of {' '.join(ROLES)}"
    if letter.isspace():
        problem = "white space inside a group; join its letters, or put '-' between groups"
    elif not letter.isalnum():
        problem = f"unknown role {letter!r}; {expected}, with '-' between groups and ';' between sections"
    elif set(word.lower()) <= set(ROLES):
        problem = f"unknown role {letter!r}; did you mean {word.lower()!r}?"
    else:
        problem = f"unknown role {letter!r}; {expected}"
    raise TopologyError(problem, text, position)


def _check_periods(text: str, groups: list[tuple[str, int]]) -> None:
    periods = Counter("".join(roles_of(group) for group, _ in groups))
    for group, position in groups:
        for offset, role in enumerate(roles_of(group)):
            if periods[role] != periods[group[0]]:
                each = ", ".join(f"{name} {periods[name]}" for name in dict.fromkeys(group))
                problem = (
                    f"group {group!r} joins roles of unlike period ({each}); each of its letters must occur "
                    "equally often in the section"
                )
                # A group from a family's expansion has no letters of its own in the text.
                raise TopologyError(problem, text, position + offset * text.startswith(group, position))


def _parse_range(text: str, begin: int, end: int) -> tuple[Bound, Bound | None]:
    spans = list(_split(text, begin, end, ":"))
    if len(spans) != 2:
        position = begin if len(spans) == 1 else text.index(":", spans[1][1])
        problem = f"range {text[begin:end]!r} is not of the form start:end, such as 0:15"
        raise TopologyError(problem, text, position)
    start = _parse_bound(text, *spans[0]) or _FIRST
    stop = _parse_bound(text, *spans[1])
    if stop == Bound(Decimal(100), percent=True):
        stop = None
    if start == Bound(Decimal(100), percent=True) or _before(start, stop) is False:
        fault = "reversed" if stop is not None and _before(stop, start) else "empty"
        problem = f"range {text[begin:end]!r} is {fault}; expected a start before the end, as in 0:15"
        raise TopologyError(problem, text, begin)
    if stop is not None and start != _FIRST and start.percent != stop.percent:
        problem = f"range {start}:{stop} mixes layers and percent; write both in layers or both in percent"
        raise TopologyError(problem, text, begin)
    return start, stop


def _parse_bound(text: str, begin: int, end: int) -> Bound | None:
    if begin == end:
        return None
    match = _BOUND.fullmatch(text, begin, end)
    if match is None:
        expected = "a layer such as 15, -2 (from the end) or a percentage such as 50%"
        raise TopologyError(f"bad bound {text[begin:end]!r}; expected {expected}", text, begin)
    if match["layer"]:
        return Bound(int(match["layer"]))
    percent = Decimal(match["percent"])
    if percent > 100:
        raise TopologyError(f"{match[0]} is more than the whole depth; expected at most 100%", text, begin)
    return Bound(percent, percent=True) if percent else _FIRST


def _before(a: Bound | None, b: Bound | None) -> bool | None:
    """Whether `a` comes before `b` (None: the end); None where that depends on the model's depth."""
    if a == b or a is None or b == _FIRST:
        return False
    if b is None or a == _FIRST:
        return True
    if (a.percent, a.value < 0) != (b.percent, b.value < 0):
        return None
    return a.value < b.value


def overlap_problem(section: Section, other: Section) -> str:
    """The error text for two sections that cover the same layer."""
    first, second = (one.range_text or "all layers" for one in (other, section))
    return f"ranges overlap ({first} and {second}); each layer belongs to one section, whose groups '-' joins"
