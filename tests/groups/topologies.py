"""Random topologies that are well formed, for tests."""

import itertools

from hypothesis import strategies as st

from ngc_jax.groups.topology import (
    ROLES,
)


@st.composite
def bodies(draw):
    """Well-formed groups: roles are dealt to parts, each part has its own period."""
    roles = draw(st.lists(st.sampled_from(ROLES), unique=True, min_size=1))
    parts = draw(st.lists(st.integers(0, 2), min_size=len(roles), max_size=len(roles)))
    groups = []
    for part in sorted(set(parts)):
        letters = [role for role, its_part in zip(roles, parts, strict=True) if its_part == part]
        letters = draw(st.permutations(letters * draw(st.integers(1, 4))))
        cuts = draw(st.sets(st.integers(1, len(letters))) if len(letters) > 1 else st.just(set()))
        edges = [0, *sorted(cuts - {len(letters)}), len(letters)]
        groups += ["".join(letters[a:b]) for a, b in itertools.pairwise(edges)]
    return "-".join(draw(st.permutations(groups)))


@st.composite
def topologies(draw):
    """(text, number of layers) with layer or percentage ranges that fit."""
    num_layers = draw(st.integers(1, 23))
    if draw(st.booleans()):
        return draw(bodies()), num_layers
    unit, top = draw(st.sampled_from([("", num_layers), ("%", 100)]))
    cuts = sorted(draw(st.sets(st.integers(0, top), min_size=2, max_size=6)) | {0})
    spans = [(a, b) for a, b in itertools.pairwise(cuts) if draw(st.booleans()) or b == cuts[-1]]
    sections = []
    for a, b in draw(st.permutations(spans)):
        start = draw(st.sampled_from(["", "0"])) if a == 0 else f"{a}{unit}"
        stop = "" if b == top and draw(st.booleans()) else f"{b}{unit}"
        if not unit and b < top and draw(st.booleans()):
            stop = str(b - num_layers)
        sections.append(f"{start}:{stop}={draw(bodies())}")
    return ";".join(sections), num_layers
