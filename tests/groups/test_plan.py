"""Plans as plain data: counts by hand, JSON, refusals, equality. How models use them is tested in tests/models."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import Block, GroupPlan, Plan

# Members of unlike width, two of which read one input; input of 9 neurons, 3 of them pivots.
Q, K, D = Block("0.q", 7, 6, bias=True), Block("0.k", 4, 6), Block("0.d", 6, 9)
FREE = GroupPlan("qkd", (Q, K, D), 3)
FIXED = dataclasses.replace(FREE, pivots=(1, 5, 8))
DENSE = Block("0.o", 5, 8, bias=True)


def site_of(name):
    return "d" if name.endswith("d") else "attention"


def test_counts_by_hand():
    assert FREE.count_parameters() == 3 * (9 + 7 + 4 + 6) + 7
    assert FIXED.count_parameters() == 3 * (6 + 7 + 4 + 6) + 7
    square = GroupPlan("k", (K,), 6, pivots=tuple(range(6)))
    assert square.count_parameters() == K.d_out * K.d_in
    plan = Plan((FIXED,), (DENSE,))
    assert plan.count_parameters() == 76 + 45
    assert plan.dense_parameters() == 7 * 6 + 7 + 4 * 6 + 6 * 9 + 45


def test_multiply_adds_by_hand():
    reads = 3 * (7 + 4 + 6)
    # q and k encode their 6 inputs once, d its 9; of the pivots 1 and 5 are among the first 6 neurons.
    assert FREE.multiply_adds(site_of) == 3 * (6 + 9) + reads
    assert FIXED.multiply_adds(site_of) == 3 * (4 + 6) + reads
    assert FREE.multiply_adds(lambda name: name) == 3 * (6 + 6 + 9) + reads
    assert Plan((FIXED,), (DENSE,)).multiply_adds(site_of) == FIXED.multiply_adds(site_of) + 5 * 8
    square = GroupPlan("k", (K,), 6, pivots=tuple(range(6)))
    assert square.multiply_adds(site_of) == K.d_out * K.d_in
    # The metric acts on each of the two signals; the lifted kernel has a gain there, and signals of its own width.
    curved = dataclasses.replace(FREE, kernel=Kernel("riemannian", metric_rank=2))
    assert curved.multiply_adds(site_of) == FREE.multiply_adds(site_of) + 2 * (3 + 3 * 2 + 2 * 3)
    lifted = dataclasses.replace(FREE, kernel=Kernel("lifted", lift=11))
    assert lifted.multiply_adds(site_of) == 11 * (6 + 9 + 17) + 2 * 11


@pytest.mark.parametrize("group", [FREE, FIXED])
def test_a_plan_survives_json(group):
    plan = Plan((group,), (DENSE,))
    data = json.loads(json.dumps(plan.to_json()))
    assert ("pivots" in data["groups"][0]) == (group is FIXED)
    assert Plan.from_json(data) == plan
    assert Plan.from_json(data).groups[0].pivots == group.pivots


@pytest.mark.parametrize(
    ("pivots", "says"),
    [
        ((1, 5), "2 pivots at rank 3"),
        ((1, 5, 5), "not in ascending order, each once"),
        ((5, 1, 8), "not in ascending order, each once"),
        ((1, 5, 9), "pivot 9 of 9 input neurons; expected indices from 0 to 8"),
        ((-1, 5, 8), "pivot -1 of 9"),
        ((1.5, 5, 8), "not a sequence of integers"),
        ("158", "not a sequence of integers"),
        (3, "not a sequence of integers"),
        ((), "0 pivots at rank 3"),
    ],
)
def test_bad_pivots_are_refused(pivots, says):
    with pytest.raises(UsageError, match=f"group 'qkd': .*{says}") as error:
        dataclasses.replace(FREE, pivots=pivots)
    assert "\n" not in str(error.value)
    data = Plan((FREE,)).to_json()
    data["groups"][0]["pivots"] = list(pivots) if isinstance(pivots, tuple) else pivots
    with pytest.raises(UsageError):
        Plan.from_json(data)


def test_other_kernels_have_no_pivots():
    with pytest.raises(UsageError, match="'riemannian' has no pivots"):
        dataclasses.replace(FIXED, kernel=Kernel("riemannian"))


def test_equality_is_by_value():
    again = Plan.from_json(Plan((FIXED,), (DENSE,)).to_json())
    plan = Plan((FIXED,), (DENSE,))
    assert again is not plan
    assert again == plan
    assert hash(again) == hash(plan)
    assert len({plan, again, Plan((FREE,), (DENSE,)), Plan((FIXED,))}) == 3
    assert FREE != FIXED
    assert Plan() != ()
    assert dataclasses.replace(FREE, pivots=[1, 5, 8]) == FIXED


def test_the_hash_is_computed_once(monkeypatch):
    plan = Plan((FIXED, dataclasses.replace(FREE, name="other", members=(Block("1.q", 7, 6),))), (DENSE,))
    hash(plan)
    monkeypatch.setattr(Block, "__hash__", lambda _: pytest.fail("hashed again"))
    monkeypatch.setattr(Block, "__eq__", lambda *_: pytest.fail("compared"))
    assert {plan: 1}[plan] == 1


def test_a_pickled_plan_is_found_in_another_process():
    """Where strings hash differently."""
    plan = Plan((FIXED,), (DENSE,))
    hash(plan), plan.group_of
    code = (
        "import json, pickle, sys; from ngc_jax.groups.plan import Plan\n"
        "plan = pickle.loads(bytes.fromhex(sys.argv[1])); other = Plan.from_json(plan.to_json())\n"
        "sys.exit(not (plan == other and hash(plan) == hash(other) and plan.group_of == other.group_of))"
    )
    command = [sys.executable, "-c", code, pickle.dumps(plan).hex()]
    assert subprocess.run(command, check=False, env=os.environ | {"PYTHONHASHSEED": "12345"}).returncode == 0
