"""Topologies as partitions: by hand, against an oracle, and what describes them."""

import ast
import doctest
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings

from ngc_jax.groups import families, topology, topology_text
from ngc_jax.groups.topology import (
    FAMILIES,
    ROLES,
    describe,
    expand,
    parse,
    spans_layers,
)
from tests.groups.topologies import bodies, topologies

DOCUMENT = Path(__file__).parents[2] / "docs" / "topology.md"


# Partitions


def short_names(text, num_layers, roles=ROLES):
    """The groups as "q0 k0" words: easy to write by hand, and a second way to say the block names."""
    names = []
    for group in expand(parse(text), num_layers, roles):
        parts = [re.fullmatch(r"layers\.(\d+)\.(attn|mlp)\.(.)", member).groups() for member in group.members]
        assert all(part == ("attn" if role in "qkvo" else "mlp") for _, part, role in parts)
        names.append(" ".join(f"{role}{layer}" for layer, _, role in parts))
    return names


BY_HAND = [
    ("q-k-v", 2, ["q0", "k0", "v0", "q1", "k1", "v1"]),
    ("qkv", 3, ["q0 k0 v0", "q1 k1 v1", "q2 k2 v2"]),
    ("ug-d", 2, ["u0 g0", "d0", "u1 g1", "d1"]),
    ("ud-gg", 3, ["u0 d0", "g0 g1", "u1 d1", "u2 d2", "g2"]),
    ("qq-kk-vv", 3, ["q0 q1", "k0 k1", "v0 v1", "q2", "k2", "v2"]),
    ("qq-kk-vvv", 4, ["q0 q1", "k0 k1", "v0 v1 v2", "q2 q3", "k2 k3", "v3"]),
    ("qq-kv", 3, ["q0 q1", "k0 v0", "k1 v1", "q2", "k2 v2"]),
    ("qkk-qvv", 4, ["q0 k0 k1", "q1 v0 v1", "q2 k2 k3", "q3 v2 v3"]),
    ("qkk-qvv", 3, ["q0 k0 k1", "q1 v0 v1", "q2 k2", "v2"]),
    ("vv-qqkk", 2, ["v0 v1", "q0 q1 k0 k1"]),
    ("hybrid1", 4, ["k0 k1", "q0 v0", "q1 v1", "q2 q3", "k2 k3", "v2 v3"]),
    ("hybrid1", 6, ["k0 k1", "q0 v0", "q1 v1", "q2 q3", "k2 k3", "v2 v3", "k4 k5", "q4 v4", "q5 v5"]),
    ("hybrid2", 4, ["q0 q1", "k0 k1", "v0 v1", "k2 k3", "q2 v2", "q3 v3"]),
    ("hybrid3", 4, ["k0 k1", "q0 v0", "q1 v1", "q2 q3", "k2 k3", "v2 v3"]),
    ("hybrid3", 5, ["k0 k1", "q0 v0", "q1 v1", "q2 q3", "k2 k3", "v2 v3", "q4", "k4", "v4"]),
    ("hybrid4", 3, ["q0", "k0", "v0", "k1 k2", "q1 v1", "q2 v2"]),
    ("hybrid5", 3, ["k0 k1 k2", "q0 q1", "v0 v1", "q2 v2"]),
    ("hybrid5", 5, ["k0 k1 k2", "q0 q1", "v0 v1", "q2 v2", "k3 k4", "q3 q4", "v3 v4"]),
    ("2:-1=qkv-o", 5, ["q2 k2 v2", "o2", "q3 k3 v3", "o3"]),
    ("3:=oo; :1=d", 5, ["d0", "o3 o4"]),
    ("hybrid4-ug", 2, ["q0", "k0", "v0", "u0 g0", "k1", "q1 v1", "u1 g1"]),
]


@pytest.mark.parametrize(("text", "num_layers", "expected"), BY_HAND)
def test_partition_by_hand(text, num_layers, expected):
    assert short_names(text, num_layers) == expected


def test_all_families_parse_and_count():
    assert len(FAMILIES) == 35
    assert sum(parse(text).roles == "qkv" for text in FAMILIES.values()) == 20
    assert sum(parse(text).roles == "ugd" for text in FAMILIES.values()) == 15
    for name, text in FAMILIES.items():
        assert str(parse(name)) == text
        assert name.startswith("hybrid") or name == text


def depth_in_layers(bound, num_layers):
    """A bound as written, read by other means than the module's: nearest layer, of two the earlier."""
    if bound.endswith("%"):
        exact = Fraction(bound[:-1]) * num_layers / 100
        return min(range(num_layers + 1), key=lambda layer: (abs(layer - exact), layer))
    return (num_layers if bound.startswith("-") else 0) + int(bound)


def oracle(text, num_layers):
    """Block -> group: follow each block to its letter, the opposite way round from `expand`."""
    group_of = {}
    for number, section in enumerate(text.split(";")):
        span, _, body = section.rpartition("=")
        start, stop = span.split(":") if span else ("", "")
        low = depth_in_layers(start.strip() or "0", num_layers)
        high = depth_in_layers(stop.strip(), num_layers) if stop.strip() else num_layers
        body = body.strip()
        for role in set(body) - {"-"}:
            places = [place for place, letter in enumerate(body) if letter == role]
            for layer in range(low, high):
                repeat, occurrence = divmod(layer - low, len(places))
                group_of[role, layer] = (number, body[: places[occurrence]].count("-"), repeat)
    return group_of


def check_against_oracle(text, num_layers):
    groups = expand(parse(text), num_layers)
    group_of = oracle(text, num_layers)
    expected = {}
    for (role, layer), key in group_of.items():
        expected.setdefault(key, set()).add(f"layers.{layer}.{'attn' if role in 'qkvo' else 'mlp'}.{role}")
    assert {frozenset(group.members) for group in groups} == set(map(frozenset, expected.values()))
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members)) == len(group_of)
    names = [group.name for group in groups]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"L\d+(_\d+)?-[qkvougd]+", name) for name in names)
    firsts = [min(int(member.split(".")[1]) for member in group.members) for group in groups]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 7, 12, 13, 30])
def test_family_partition(family, num_layers):
    check_against_oracle(FAMILIES[family], num_layers)


@settings(deadline=None, max_examples=300)
@given(topologies())
def test_random_partition(case):
    check_against_oracle(*case)


@given(bodies())
def test_whether_groups_span_layers(body):
    groups = expand(parse(body), 12)  # every period of `bodies` fits into 12 layers
    several = any(len({member.split(".")[1] for member in group.members}) > 1 for group in groups)
    assert spans_layers(parse(body)) == several


def test_periods_are_counted_within_a_section():
    assert short_names("0:2=qk; 2:=qq-k", 4) == ["q0 k0", "q1 k1", "q2 q3", "k2", "k3"]


def test_percent_is_rounded_to_the_nearest_layer_and_down_between_two():
    thirds = parse("0:33.3%=q; 33.3%:66.7%=k; 66.7%:=v")
    for num_layers in (3, 30, 300):
        sizes = [sum(f"-{role}" in group.name for group in expand(thirds, num_layers)) for role in "qkv"]
        assert sizes == [num_layers // 3] * 3
    for num_layers in range(1, 40):
        half = expand(parse("0:50%=q"), num_layers)
        assert len(half) == num_layers // 2


# Description


def test_describe():
    table = describe(parse("0:3=qkk-qvv; 4:=qkv-o"), 7, "qkvoud")
    assert [re.split(r"\s{2,}", line) for line in table.splitlines()] == [
        ["layers", "share a latent space", "groups"],
        ["0-2", "q0 k0 k1", "2, the last cut short"],
        ["0-2", "q1 v0 v1", "2, the last cut short"],
        ["4-6", "q k v", "3"],
        ["4-6", "o", "3"],
        ["3", "dense: q k v"],
        ["0-3", "dense: o"],
        ["0-6", "dense: u d"],
    ]


@settings(deadline=None)
@given(topologies())
def test_describe_counts_the_groups(case):
    text, num_layers = case
    members = {}  # (section, group) -> repeat -> number of members
    for number, order, repeat in oracle(text, num_layers).values():
        sizes = members.setdefault((number, order), {})
        sizes[repeat] = sizes.get(repeat, 0) + 1
    bodies = [section.rpartition("=")[2].split("-") for section in text.split(";")]
    expected = [
        (len(sizes), sizes[max(sizes)] < len(bodies[number][order]))
        for (number, order), sizes in sorted(members.items())
    ]
    rows = [re.split(r"\s{2,}", line) for line in describe(parse(text), num_layers).splitlines()[1:]]
    counts = [row[2] for row in rows if not row[1].startswith("dense: ")]
    assert [(int(count.split(",")[0]), "cut short" in count) for count in counts] == expected


# Module


def test_no_array_library_is_imported():
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "decimal",
        "difflib",
        "math",
        "re",
        "types",
        "ngc_jax",
    }
    for module in (topology, topology_text, families):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed
                assert not node.module.startswith("ngc_jax") or node.module.split(".")[-1] in {
                    "errors",
                    "families",
                    "topology_text",
                }


def test_documented_examples():
    fences_removed = re.sub(r"^```.*$", "", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for text, names in ((fences_removed, {}), (topology.__doc__, {"expand": expand, "parse": parse})):
        examples = doctest.DocTestParser().get_doctest(text, names, "examples", None, 0)
        assert examples.examples
        report = []
        result = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
        assert result.failed == 0, "".join(report)


def test_document_lists_all_families():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FAMILIES)
    assert all(f"`{FAMILIES[f'hybrid{n}']}`" in text for n in range(1, 6))
