import ast
import doctest
import itertools
import pickle
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.groups import families, topology, topology_text
from ngc_jax.groups.topology import (
    FAMILIES,
    ROLES,
    TopologyError,
    describe,
    expand,
    format_topology,
    parse,
    spans_layers,
)

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


# Text


@settings(deadline=None, max_examples=300)
@given(topologies())
def test_round_trip(case):
    text, num_layers = case
    parsed = parse(text)
    again = parse(format_topology(parsed))
    assert again == parsed
    assert hash(again) == hash(parsed)
    assert str(again) == str(parsed)
    assert expand(again, num_layers) == expand(parsed, num_layers)


@settings(deadline=None)
@given(topologies(), st.text(" \t\n", max_size=2))
def test_white_space_around_tokens_is_ignored(case, space):
    text, _ = case
    spaced = re.sub("([;=:%]|(?<!:)-)", rf"{space}\1{space}", text)  # a '-' behind ':' is a sign
    assert parse(space + spaced + space) == parse(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("0:15=kk-qv; 15:30=qq-kk-vv", "0:15=kk-qv; 15:30=qq-kk-vv"),
        (":15=kk-qv;15:=qq", "0:15=kk-qv; 15:=qq"),
        ("0%:50.0%=q", "0:50%=q"),
        ("50 % : 100%=q", "50%:=q"),
        (":=qkv", "qkv"),
        ("0:100%=qkv", "qkv"),
        ("007:-2=q", "7:-2=q"),
        ("33.30%:=q", "33.3%:=q"),
        ("0.000001%:20%=q", "0.000001%:20%=q"),
        ("hybrid3", "0:50%=kk-qv; 50%:=qq-kk-vv"),
        ("o-hybrid3-ug", "0:50%=o-kk-qv-ug; 50%:=o-qq-kk-vv-ug"),
        ("0:4=hybrid5-d; 4:=o", "0:4=kkk-qq-vv-qv-d; 4:=o"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


# Errors


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "the text is empty; expected groups"),
        (" \n", 0, "the text is empty"),
        ("qxk", 1, "unknown role 'x'; expected one of q k v o u g d"),
        ("qk-Qv", 3, "did you mean 'qv'"),
        ("qk\n-\tx", 5, "unknown role 'x'"),
        ("qk-ug1", 5, "unknown role '1'"),
        ("q,k", 1, "'-' between groups"),
        ("qk–v", 2, "'-' between groups"),
        ("q k", 1, "white space inside a group"),
        ("qk--v", 3, "a group is missing"),
        ("qk- -v", 4, "a group is missing"),
        ("-qk", 0, "a group is missing"),
        ("qk-", 3, "a group is missing"),
        ("qk;", 3, "a group is missing"),
        ("0:15=", 5, "a group is missing"),
        ("Hybrid3", 0, "did you mean 'hybrid3'"),
        ("ug-hybird2", 3, "did you mean 'hybrid2'"),
        ("hybrid6", 0, "expected one of hybrid1 hybrid2 hybrid3 hybrid4 hybrid5"),
        ("v-qkk", 3, "group 'qkk' joins roles of unlike period (q 1, k 2)"),
        ("qk-kv-v", 1, "group 'qk' joins roles of unlike period (q 1, k 2)"),
        ("hybrid1-q", 0, "group 'qv' joins roles of unlike period (q 5, v 4)"),
        ("0:4=q;4:=uug", 11, "unlike period (u 2, g 1)"),
        ("0:15 kk", 1, "without '='"),
        ("=qk", 0, "not of the form start:end"),
        ("15=qk", 0, "not of the form start:end"),
        ("q;0-15=k", 2, "not of the form start:end"),
        ("0:15: 2=qk", 4, "not of the form start:end"),
        ("0:1x=qk", 2, "bad bound '1x'"),
        ("0:1.5=qk", 2, "bad bound '1.5'"),
        ("1234567:=qk", 0, "bad bound '1234567'"),
        ("٣:=qk", 0, "bad bound"),
        ("0:-5%=qk", 2, "bad bound '-5%'"),
        ("0:4=q=k", 5, "unknown role '='"),
        ("0:50%=q; 50%:150%=k", 13, "150% is more than the whole depth; expected at most 100%"),
        ("15:0=qk", 0, "'15:0' is reversed"),
        ("q; 60%:50%=k", 3, "'60%:50%' is reversed"),
        ("-2:-4=k", 0, "'-2:-4' is reversed"),
        ("5:5=k", 0, "'5:5' is empty"),
        (":0=k", 0, "':0' is empty"),
        ("100%:=k", 0, "'100%:' is empty"),
        ("25:50%=k", 0, "25:50% mixes layers and percent"),
        ("0:15=q; 10:20=k", 8, "ranges overlap (0:15 and 10:20)"),
        ("10:20=q;0:11=k", 8, "ranges overlap (10:20 and 0:11)"),
        ("0:60%=q; 50%:=k", 9, "ranges overlap (0:60% and 50%:)"),
        ("-4:=q; -5:-3=k", 7, "ranges overlap (-4: and -5:-3)"),
        ("qkv; ug", 5, "ranges overlap (all layers and all layers)"),
        ("hybrid3; ug", 9, "ranges overlap (0:50% and all layers)"),
        ("0:4=hybrid3", 4, "hybrid3 has ranges of its own"),
        ("hybrid3-hybrid4", 8, "hybrid4 has ranges of its own"),
    ],
)
def test_error_points_at_the_character(text, position, words):
    with pytest.raises(TopologyError, match=re.escape(words)) as caught:
        parse(text)
    check_message(caught.value, text, position)


def check_message(error, text, position):
    assert isinstance(error, UsageError)
    assert error.position == position
    lines = str(error).split("\n")
    assert lines[0] == f"topology, character {position + 1}: {error.problem}"
    if not text.strip():
        assert len(lines) == 1
        return
    assert len(lines) == 3
    shown, caret = lines[1:]
    assert shown.split() == text.split()
    assert shown.index(text[0] if text[0].strip() else text.strip()[0]) == 4 + len(text) - len(text.lstrip())
    assert caret == " " * (4 + position) + "^"


@pytest.mark.parametrize(
    ("text", "num_layers", "roles", "position", "words"),
    [
        ("0:4=qk;4:=ug", 8, "qkvoud", 12, "the model has no role 'g'; its roles are q k v o u d"),
        ("0:9=q", 8, ROLES, 0, "range 0:9 reaches beyond a model of 8 layers (0 to 7)"),
        ("0:2=q;9:=k", 8, ROLES, 7, "range 9: reaches beyond a model of 8 layers"),
        ("-9:=q", 8, ROLES, 0, "range -9: reaches beyond a model of 8 layers"),
        ("8:=q", 8, ROLES, 0, "range 8: covers nothing in a model of 8 layers"),
        ("2:-2=q", 4, ROLES, 0, "range 2:-2 covers nothing in a model of 4 layers"),
        ("2:-2=q", 3, ROLES, 0, "range 2:-2 covers nothing"),
        ("0:50%=q;3:=k", 8, ROLES, 9, "ranges overlap (0:50% and 3:)"),
        ("0:4=q;-5:=k", 8, ROLES, 7, "ranges overlap (0:4 and -5:)"),
    ],
)
def test_topology_that_does_not_fit_the_model(text, num_layers, roles, position, words):
    for function in (expand, describe):
        with pytest.raises(TopologyError, match=re.escape(words)) as caught:
            function(parse(text), num_layers, roles)
        check_message(caught.value, str(parse(text)), position)


def test_depth_dependent_ranges_are_settled_by_the_depth():
    half_and_last = parse("0:50%=q; 4:=k")
    assert len(expand(half_and_last, 8)) == 8
    with pytest.raises(TopologyError, match="overlap"):
        expand(half_and_last, 10)


@pytest.mark.parametrize("num_layers", [0, -1])
def test_model_without_layers(num_layers):
    with pytest.raises(UsageError, match="at least 1 layer"):
        expand(parse("qkv"), num_layers)


def test_error_survives_pickling():
    with pytest.raises(TopologyError) as caught:
        parse("qk--v")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.position) == (str(caught.value), 3)


@settings(deadline=None, max_examples=500)
@given(st.text("qkvougd-;:=%0125. hybrid3Q", max_size=14))
def test_any_text_parses_or_is_a_topology_error(text):
    try:
        canonical = str(parse(text))
    except TopologyError as error:
        position, lines = error.position, str(error).split("\n")
    else:
        position, lines = 0, [str(parse(canonical))]
        assert lines == [canonical]
    assert 0 <= position <= len(text)
    assert len(lines) in (1, 3)


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
