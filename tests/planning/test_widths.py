"""Widths and ranks that keep ratios ask for, by counting alone."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ngc_jax.conversion import Recipe
from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import GroupPlan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import check_budget, choose_ranks, full_rank, given_ranks
from tests.conversion.helpers import factorise_of
from tests.tiny import HF_CONFIGS

SMOLLM2 = DecoderConfig.from_hf(
    {
        **HF_CONFIGS["llama"],
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
)


def stored(config: DecoderConfig, recipe: Recipe) -> int:
    """What a conversion by a recipe stores for the planned blocks, at losses that fall from group to group."""
    factorise = factorise_of(recipe)
    narrow, keep = recipe.chain.plan(config, recipe.keep)
    rule, cells = factorise.rule(keep), candidate_cells(narrow, factorise.topology)
    check_budget(rule, cells)
    groups = all_candidates(cells)
    energies = {group.name: np.geomspace(1, 1e-3, full_rank(group.members)) / n for n, group in enumerate(groups, 1)}
    ranks = given_ranks(rule, groups) or choose_ranks(rule, cells, energies.__getitem__)
    total = 0
    for group in groups:
        rank = ranks.get(group.name, None)
        if rank == DENSE:
            total += group.dense_parameters
        elif rank is not None:
            pivots = tuple(range(rank)) if factorise.gauge else None
            total += GroupPlan(group.name, group.members, rank, pivots=pivots).count_parameters()
    return total


def dense(config: DecoderConfig, recipe: Recipe) -> int:
    groups = all_candidates(candidate_cells(config, factorise_of(recipe).topology))
    return sum(member.parameters for group in groups for member in group.members)


@settings(max_examples=100)
@given(
    st.sampled_from(["nystrom", "ngc", "svd_llm", "svd_llm_v2", "kfac_svd"]),
    st.sampled_from(["q-k-v-o-u-g-d", "qkv-o-ug-d", "u-g-d", "q-u-g-d", "qq-uu-gg-dd"]),
    st.sampled_from(["llama", "llama_untied", "qwen2"]),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.one_of(st.integers(8, 700), st.integers(1, 12).map(lambda n: 128 * n)),
    st.floats(0.05, 1, exclude_min=True),
)
def test_every_keep_ratio_has_a_plan_within_it_or_its_lower_bound_is_named(
    method, topology, architecture, embed, hidden, keep
):
    sizes = {"hidden_size": embed, "intermediate_size": hidden, "num_hidden_layers": 2, "head_dim": 2 * (embed // 8)}
    config = DecoderConfig.from_hf({**HF_CONFIGS[architecture], **sizes})
    try:
        recipe = Recipe(method, topology, keep)
        assume(method != "svd_llm_v2" or "qq" not in topology)
        count = stored(config, recipe)
    except UsageError as error:
        found = re.search(r"raise it to at least ([0-9.]+),", str(error))
        if found is None:
            if "cannot make these groups smaller" not in str(error):
                raise
            return
        bound = float(found[1])
        assert keep < bound <= 1
        recipe = Recipe(method, topology, bound)
        count = stored(config, recipe)
        # It is the true one: a hair less has no ranks.
        with pytest.raises(UsageError, match="too low"):
            stored(config, Recipe(method, topology, bound - 3e-4))
    assert 0 < count <= recipe.keep * dense(config, recipe) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("levers", "width"),
    [
        ({"topology": "u-g-d", "keep": 0.34}, 512),
        ({"keep": 0.05}, 64),
        ({"keep": 0.97}, 1536),
        ({"keep": 0.9584}, 1536),
    ],
)
def test_a_width_that_nobody_gave_is_never_refused(levers, width):
    recipe = Recipe("nystrom", **levers)
    narrow, _ = recipe.chain.plan(SMOLLM2, recipe.keep)
    assert narrow.mlp_dim == width
    assert 0.9 * recipe.keep < stored(SMOLLM2, recipe) / dense(SMOLLM2, recipe) <= recipe.keep


def test_a_given_width_is_rounded_and_not_refused_for_that():
    narrow, keep = Recipe("nystrom", "u-g-d", 0.34, keep_neurons=0.34).chain.plan(SMOLLM2, 0.34)
    assert (narrow.mlp_dim, keep) == (512, 1.0)
    with pytest.raises(UsageError, match="leaves less than keep ratio"):
        Recipe("nystrom", "u-g-d", 0.34, keep_neurons=0.3).chain.plan(SMOLLM2, 0.34)
