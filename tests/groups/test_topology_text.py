"""Topologies as text: the canonical form, and errors that point at a character."""

import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.groups.topology import (
    ROLES,
    TopologyError,
    describe,
    expand,
    format_topology,
    parse,
)
from tests.groups.topologies import topologies


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
