import itertools
import math

import numpy as np
import pytest

from ngc_jax.conversion import Recipe
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.latent_cache import numbers_per_token
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.cache_budget import cached_layers, cached_numbers, uniform_caps
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import check_budget, choose_ranks, given_ranks
from tests.conversion.helpers import factorise_of, rule_of
from tests.planning.test_ranks import config_of, falling_energies, planned
from tests.tiny import HF_CONFIGS


def chosen(recipe, config, energies=None):
    cells = candidate_cells(config, factorise_of(recipe).topology)
    check_budget(rule_of(recipe), cells)
    energies = energies or falling_energies(cells)
    groups = all_candidates(cells)
    ranks = given_ranks(rule_of(recipe), groups) or choose_ranks(rule_of(recipe), cells, energies.__getitem__)
    return groups, ranks, planned(cells, ranks, factorise_of(recipe).gauge)


@pytest.mark.parametrize("topology", ["kv", "k-v", "qkv-o", "kk-vv", "qk-v", "kk-qv"])
def test_numbers_are_those_that_the_cache_keeps(topology):
    """Counted from candidates as the latent cache counts them from the plan; at every rank."""
    config = config_of(layers=2)
    groups = all_candidates(candidate_cells(config, topology))
    for rank in (1, 7, 19):
        plan = planned(candidate_cells(config, topology), {group.name: rank for group in groups}, gauge=False)
        assert sum(cached_numbers(group, rank) for group in groups) == numbers_per_token(config, plan, "latent")
    assert sum(cached_numbers(group, DENSE) for group in groups) == numbers_per_token(config, None, "full")


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
def test_both_ratios_hold(keep, ratio):
    config = config_of()
    groups, ranks, plan = chosen(Recipe("ngc", keep=keep, cache_ratio=ratio, keep_neurons=1.0), config)
    kept = numbers_per_token(config, plan, "latent") / numbers_per_token(config, plan, "full")
    assert plan.keep_ratio() <= keep
    assert kept <= ratio
    assert {group.name for group in groups if len(group.members) == 2} == {f"L{layer}-kv" for layer in range(3)}
    if keep == 1:
        assert {name for name, rank in ranks.items() if rank == DENSE} == {
            group.name for group in groups if not cached_layers(group)
        }
        assert kept > min(ratio, 24 / 40) - 0.03  # full rank is 24, of 40 numbers


def test_the_cache_is_distributed_as_the_losses_want():
    """All choices of three layers' ranks, tried one by one."""
    config = config_of()
    cells = candidate_cells(config, "kv")
    energies = falling_energies(cells, seed=4, size=lambda layer: 10.0**-layer)
    full, best = 40 * 3, (math.inf, ())
    for ratio in (0.55, 0.3):
        _, ranks, _ = chosen(Recipe("ngc", "kv", 1.0, cache_ratio=ratio, keep_neurons=1.0), config, energies)
        tails = [np.append(np.cumsum(e[::-1])[::-1], 0.0) for e in energies.values()]
        best = min(
            (sum(tail[r] for tail, r in zip(tails, some, strict=True)), some)
            for some in itertools.product(range(1, 25), repeat=3)
            if sum(some) <= math.floor(ratio * full)
        )
        found = sum(tail[ranks[name]] for tail, name in zip(tails, energies, strict=True))
        # The optimum over the convex hulls; distinct energies leave no gap above one rank.
        assert found <= best[0] * (1 + 1e-9) + 1e-12
        assert len(set(best[1])) > 1


def test_other_allocations_give_every_layer_the_same_share():
    config = config_of()
    _, ranks, plan = chosen(Recipe("svd", keep=1.0, cache_ratio=0.5, gauge=True), config)
    assert {ranks[f"L{layer}-kv"] for layer in range(3)} == {20}
    assert {ranks[f"L{layer}-{role}"] for layer in range(3) for role in "qougd"} == {DENSE}
    _, private, other = chosen(Recipe("svd", "k-v", keep=1.0, cache_ratio=0.5, gauge=True), config)
    assert set(private.values()) == {10}
    assert numbers_per_token(config, plan, "latent") == numbers_per_token(config, other, "latent") == 3 * 20
    caps = uniform_caps(0.5, all_candidates(candidate_cells(config, "qkk-qvv")))
    assert set(caps.values()) == {10}


def test_a_whole_share_is_not_rounded_down():
    config = DecoderConfig.from_hf({**HF_CONFIGS["llama"], "head_dim": 50})
    groups = all_candidates(candidate_cells(config, "kv"))
    assert set(uniform_caps(0.29, groups).values()) == {58}  # 0.29 * 200 is below 58 in floating point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_ratio": 0.0}, r"cache ratio 0 is outside \(0, 1\]"),
        ({"cache_ratio": 1.5}, "outside"),
        ({"cache_ratio": 0.5, "rank": 4}, "leave out one of them"),
        ({"cache_ratio": 0.5, "topology": "auto"}, "needs a topology"),
        ({"cache_ratio": 0.5, "kernel": "lifted", "lift": 50}, "wider than its ranks"),
    ],
)
def test_options_that_contradict_a_cache_ratio_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Recipe("ngc", **options)


def test_ratios_that_no_rank_reaches_are_refused_before_anything_is_measured():
    cells = candidate_cells(config_of(), "q-kv-o-u-g-d")
    with pytest.raises(UsageError, match=r"cache ratio 0\.01 is too low: the smallest ranks keep 0\.025 of the cache"):
        check_budget(rule_of(Recipe("ngc", keep=0.8, cache_ratio=0.01)), cells)
    with pytest.raises(UsageError, match="needs k and v in the topology"):
        check_budget(rule_of(Recipe("ngc", "u-g-d", keep=0.8, cache_ratio=0.5)), candidate_cells(config_of(), "u-g-d"))
