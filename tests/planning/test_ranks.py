import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.closed_form import Factors
from ngc_jax.conversion.spill import Fitted, Spill
from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import check_budget, choose_ranks, full_rank, given_ranks, uniform_rank
from tests.conversion.helpers import rule_of
from tests.tiny import HF_CONFIGS


def config_of(layers=3, scale=1, architecture="llama_untied"):
    """Wider than the tiny models where ranks must be fine; nothing here makes a parameter."""
    widths = {"hidden_size": 24 * scale, "intermediate_size": 40 * scale, "head_dim": 10 * scale}
    return DecoderConfig.from_hf({**HF_CONFIGS[architecture], **widths, "num_hidden_layers": layers})


def falling_energies(cells, seed=0, size=None):
    """Energies by group name; `size` scales them by the group's first layer."""
    rng, found = np.random.default_rng(seed), {}
    for group in all_candidates(cells):
        layer = int(group.members[0].name.split(".")[1])
        energies = rng.exponential(size=full_rank(group.members)) * np.logspace(0, -3, full_rank(group.members))
        found[group.name] = np.sort(energies)[::-1] * (1.0 if size is None else size(layer))
    return found


def planned(cells, ranks, gauge):
    """The plan that these ranks make; pivots only need to be some."""
    groups, dense = [], []
    for group in all_candidates(cells):
        if ranks.get(group.name) == DENSE:
            dense += group.members
        elif group.name in ranks:
            rank = ranks[group.name]
            groups.append(GroupPlan(group.name, group.members, rank, pivots=tuple(range(rank)) if gauge else None))
    return Plan(tuple(groups), tuple(dense))


@example([2], 2, math.nextafter(1.0, 0.0), True)
@example([26, 40], 33, math.nextafter(1.0, 0.0), False)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 40), st.floats(0.01, 1), st.booleans())
def test_uniform_rank_is_the_largest_that_fits(outputs, inputs, keep, gauge):
    members = [Block(str(index), width, inputs) for index, width in enumerate(outputs)]
    total = sum(outputs)
    wanted = keep * total * inputs

    def stored(rank):
        return rank * (total + inputs - (rank if gauge else 0))

    # The gauge stores as much at ranks above half of M + I as below; full rank is never above that.
    fitting = [rank for rank in range(1, min(total, inputs) + 1) if stored(rank) <= wanted * (1 + 1e-12)]
    if fitting:
        assert uniform_rank(members, keep, gauge=gauge) == max(fitting)
    else:
        with pytest.raises(UsageError, match="leaves no rank for 0"):
            uniform_rank(members, keep, gauge=gauge)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 12), (12, 7), (9, 9), (1, 5), (960, 576)])
def test_a_whole_root_is_not_rounded_down(outputs, inputs):
    """In the fixed gauge keep 1 is full rank."""
    member = [Block("a", outputs, inputs)]
    for rank in range(1, min(outputs, inputs) + 1):
        keep = rank * (outputs + inputs - rank) / (outputs * inputs)
        assert uniform_rank(member, keep, gauge=True) == rank
    assert uniform_rank(member, 1.0, gauge=True) == full_rank(member)


def test_a_narrow_member_counts_its_own_weights():
    """Members of 6 x 8 and 4 x 5: 68 weights, 10 outputs and 8 inputs."""
    members = (Block("a", 6, 8), Block("b", 4, 5))
    assert uniform_rank(members, 0.9) == math.floor(0.9 * 68 / 18)
    assert uniform_rank(members, 0.9, round) == 3
    rank = uniform_rank(members, 0.9, gauge=True)
    assert rank * (18 - rank) <= 0.9 * 68 < (rank + 1) * (17 - rank)
    assert full_rank(members) == 8


def test_given_ranks():
    config = config_of()
    groups = all_candidates(candidate_cells(config, "qkv-o-ug-d"))
    assert given_ranks(rule_of(Recipe("ngc")), groups) == {}
    assert given_ranks(rule_of(Recipe("svd_llm_v2")), groups) == {}
    assert set(given_ranks(rule_of(Recipe("ngc", rank=5)), groups).values()) == {5}
    full = given_ranks(rule_of(Recipe("ngc", rank="full")), groups)
    assert given_ranks(rule_of(Recipe("ngc", rank=10**6)), groups) == full
    assert full == {g.name: full_rank(g.members) for g in groups}
    for gauge in (False, True):
        ranks = given_ranks(rule_of(Recipe("svd_llm", keep=0.7, gauge=gauge)), groups)
        assert ranks == {g.name: uniform_rank(g.members, 0.7, gauge=gauge) for g in groups}


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("topology", ["q-k-v-o-u-g-d", "qq-kk-vv-o-uu-gg-dd", "hybrid1", "auto"])
def test_ranks_by_loss_store_what_the_keep_ratio_says(topology, gauge):
    cells = candidate_cells(config_of(), topology)
    energies = falling_energies(cells)
    previous = -1
    for keep in (0.3, 0.5, 0.8, 0.95):
        recipe = Recipe("ngc", topology, keep, gauge=gauge)
        check_budget(rule_of(recipe), cells)
        plan = planned(cells, choose_ranks(rule_of(recipe), cells, energies.__getitem__), gauge)
        assert {block.name for block in plan.blocks()} == {m.name for c in cells for g in c[0] for m in g.members}
        budget = math.floor(keep * plan.dense_parameters())
        assert previous < plan.count_parameters() <= budget
        # One rank of the widest group is the most that nothing fits into.
        assert plan.count_parameters() > budget - 200
        previous = plan.count_parameters()


def test_keep_one_leaves_everything_dense():
    for topology in ("q-k-v-o-u-g-d", "auto"):
        cells = candidate_cells(config_of(), topology)
        ranks = choose_ranks(rule_of(Recipe("ngc", topology, 1.0)), cells, falling_energies(cells).__getitem__)
        assert set(ranks.values()) == {DENSE}


def test_rank_multiples():
    cells = candidate_cells(config_of(scale=4), "q-k-v-o-u-g-d")
    recipe = Recipe("ngc", keep=0.6, rank_multiple=8)
    ranks = choose_ranks(rule_of(recipe), cells, falling_energies(cells).__getitem__)
    assert all(rank % 8 == 0 for rank in ranks.values())
    assert len(set(ranks.values())) > 1
    plan = planned(cells, ranks, gauge=True)
    assert 0.57 < plan.keep_ratio() <= 0.6


def test_sharing_is_chosen_where_it_loses_less():
    """The same energies for a pair of layers as for one of them: sharing stores less for the same loss."""
    cells = candidate_cells(config_of(layers=2), "auto")
    energies = {}
    for group in all_candidates(cells):
        layers = {member.name.split(".")[1] for member in group.members}
        falling = np.logspace(0, -3, full_rank(group.members))
        energies[group.name] = falling if len(layers) == 2 else 10 * falling
    shared = choose_ranks(rule_of(Recipe("ngc", "auto", 0.4)), cells, energies.__getitem__)
    assert set(shared) == {"L0_1-qq", "L0_1-kk", "L0_1-vv", "L0_1-oo", "L0_1-uu", "L0_1-gg", "L0_1-dd"}
    for name in shared:
        energies[name] = 1000 * energies[name]
    apart = choose_ranks(rule_of(Recipe("ngc", "auto", 0.4)), cells, energies.__getitem__)
    assert not set(apart) & set(shared)


def test_lossier_layers_keep_more_in_svd_llm_v2():
    config = config_of(layers=5, scale=8)
    cells = candidate_cells(config, "q-k-v-o-u-g-d")
    recipe = Recipe("svd_llm_v2", keep=0.6)
    energies = falling_energies(cells, size=lambda layer: 10.0**layer)
    ranks = choose_ranks(rule_of(recipe), cells, energies.__getitem__)
    for role in "qkvougd":
        by_layer = [ranks[f"L{layer}-{role}"] for layer in range(5)]
        assert all(lossier > less for less, lossier in itertools.pairwise(by_layer))
        block = config.block(0, role)
        kept = [rank * (block.d_out + block.d_in) / (block.d_out * block.d_in) for rank in by_layer]
        # Every rank is rounded down.
        assert 0.6 - (block.d_out + block.d_in) / (block.d_out * block.d_in) < np.mean(kept) <= 0.6
    even = choose_ranks(rule_of(recipe), cells, {name: np.ones(len(e)) for name, e in energies.items()}.__getitem__)
    uniform = {group.name: uniform_rank(group.members, 0.6) for group in all_candidates(cells)}
    assert all(abs(even[name] - uniform[name]) <= 1 for name in uniform)


def test_svd_llm_v2_leaves_every_layer_a_rank_and_keeps_to_the_budget():
    """By the published formula the layer of no loss would remove several times what it has."""
    config, keep = config_of(layers=5, scale=8), 0.3
    cells = candidate_cells(config, "q-d")
    energies = falling_energies(cells, size=lambda layer: 1e-20 if layer == 0 else 1e30)
    ranks = choose_ranks(rule_of(Recipe("svd_llm_v2", keep=keep)), cells, energies.__getitem__)
    for role in "qd":
        block = config.block(0, role)
        assert ranks[f"L0-{role}"] == 1
        assert len({ranks[f"L{layer}-{role}"] for layer in range(1, 5)}) == 1
        stored = sum(ranks[f"L{layer}-{role}"] for layer in range(5)) * (block.d_out + block.d_in)
        budget = keep * 5 * block.d_out * block.d_in
        assert budget - 4 * (block.d_out + block.d_in) < stored <= budget


def test_svd_llm_v2_of_losses_that_are_zero_is_uniform():
    cells = candidate_cells(config_of(layers=2, scale=4), "q-d")
    zeros = {group.name: np.zeros(full_rank(group.members)) for group in all_candidates(cells)}
    ranks = choose_ranks(rule_of(Recipe("svd_llm_v2", keep=0.5)), cells, zeros.__getitem__)
    assert ranks == {group.name: uniform_rank(group.members, 0.5) for group in all_candidates(cells)}


def test_a_keep_ratio_that_no_ranks_reach_is_refused_before_anything_is_measured():
    cells = candidate_cells(config_of(), "q-k-v-o-u-g-d")
    for method in ("ngc", "svd", "svd_llm_v2"):
        check_budget(rule_of(Recipe(method, keep=0.2)), cells)
        with pytest.raises(UsageError, match="keep ratio"):
            check_budget(rule_of(Recipe(method, keep=0.01)), cells)
    check_budget(rule_of(Recipe("ngc", keep=0.2, rank_multiple=2)), cells)
    with pytest.raises(UsageError, match="lower the rank multiple"):
        check_budget(rule_of(Recipe("ngc", keep=0.2, rank_multiple=16)), cells)


def test_a_method_without_losses_says_so():
    cells = candidate_cells(config_of(), "q")
    with pytest.raises(UsageError, match=r"ngc_paper gives no losses .* use allocation uniform"):
        choose_ranks(rule_of(Recipe("ngc_paper", "q", allocation="loss")), cells, lambda name: None)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_way_of_a_cell_has_the_same_blocks(layers):
    config = config_of(layers)
    cells = candidate_cells(config, "auto")
    seen = []
    for cell in cells:
        blocks = [sorted(member.name for group in way for member in group.members) for way in cell]
        assert all(names == blocks[0] for names in blocks)
        assert len(set(blocks[0])) == len(blocks[0])
        assert len(set(cell)) == len(cell)
        # The first way is the private one, whose groups are what a budget is refused by.
        assert all(len(group.members) == 1 for group in cell[0])
        assert len({way[0].dense_parameters for way in cell if len(way) == 1}) <= 1
        seen += blocks[0]
    assert sorted(seen) == sorted(block.name for block in config.blocks())
    # The last of an odd number of layers shares with nobody: only members with one input may.
    ways = [len(cell) for cell in cells if cell[0][0].members[0].name.startswith(f"layers.{layers - 1}.")]
    assert ways == ([2, 1, 2, 1] if layers % 2 else [])


def test_a_topology_is_one_way():
    config = config_of()
    cells = candidate_cells(config, "qkv-oo")
    assert all(len(cell) == 1 and len(cell[0]) == 1 for cell in cells)
    group = cells[0][0][0]
    assert (group.name, group.outputs, group.inputs, group.biases) == ("L0-qkv", 80, 24, 80)
    assert group.dense_parameters == 80 * 24 + 80
    with pytest.raises(UsageError):
        candidate_cells(config, "0:9=q")


def test_states_wait_on_disk(tmp_path):
    rng, spill = np.random.default_rng(0), Spill(tmp_path)
    for name, energies in (("a", np.arange(4.0)), ("b/with: a name", None)):
        outputs = tuple(rng.standard_normal((size, 4)) for size in (3, 5))
        states = Factors(rng.standard_normal((6, 4)), outputs, energies, nested=energies is not None)
        scale = rng.uniform(size=6) if energies is None else None
        for _ in range(2):  # Another round writes over the first.
            spill.put(name, Fitted(states, scale))
            back = spill.get(name)
            np.testing.assert_array_equal(back.states.input_states, states.input_states.astype(np.float32))
            for found, output in zip(back.states.output_states, outputs, strict=True):
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, output.astype(np.float32))
        assert back.input_scale is scale
        assert back.states.energies is spill.energies(name) is energies
        assert back.states.nested == spill.nested(name) == (energies is not None)
    assert spill.get("a").states.output_states[0].shape == (3, 4)
    assert len(list(tmp_path.iterdir())) == 2


def test_biases_are_within_the_keep_ratio():
    members = (Block("a", 40, 24, bias=True),)
    rank = uniform_rank(members, 0.5)
    assert rank * 64 + 40 <= 0.5 * 1000 < (rank + 1) * 64 + 40
