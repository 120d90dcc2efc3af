import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.fitting import fit_all
from ngc_jax.conversion.input_drift import carried_over, regression
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.propagation import _by_input, _moved, _refit
from ngc_jax.conversion.statistics import FirstTokens
from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import weights
from ngc_jax.models.config import block_name
from ngc_jax.models.experts import BLOCK_INPUTS
from ngc_jax.models.layers import INPUT_SITE
from ngc_jax.models.layerwise import inputs_by_site
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from tests.conversion.helpers import factorise_of, measured, propagated
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(1200)


def converted(propagation, topology=None, **levers):
    recipe = Recipe("ngc", topology, 0.5, propagation=propagation, **levers)
    model = tiny_model("llama_untied")
    return model, convert(model, recipe, TOKENS, window=60, batch_size=4)


def test_the_shifted_target_is_the_least_squares_solution():
    """W R minimises E || W x - T x' ||^2 over T, against float64 least squares."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5000, 7))
    mixing = np.eye(7) + 0.3 * generator.standard_normal((7, 7))
    noisy = x @ mixing + 0.3 * generator.standard_normal((5000, 7))
    weight = generator.standard_normal((4, 7))
    target = weight @ regression(noisy.T @ noisy / 5000, x.T @ noisy / 5000)
    best, *_ = np.linalg.lstsq(noisy, x @ weight.T, rcond=None)

    def loss(t):
        return np.square(x @ weight.T - noisy @ t.T).mean()

    assert loss(best.T) <= loss(target) < 1.02 * loss(best.T)
    assert loss(target) < 0.8 * loss(weight)
    of_weight = regression(noisy.T @ noisy / 5000, x.T @ noisy / 5000, weight)
    np.testing.assert_allclose(of_weight, target, atol=1e-12)
    # What is no second moment tells nothing; inputs that have not changed move nothing.
    np.testing.assert_array_equal(regression(np.diag([1.0, -1.0]), np.ones((2, 2))), np.eye(2))
    np.testing.assert_array_equal(regression(np.diag([1.0, -1.0]), np.ones((2, 2)), np.ones((3, 2))), np.ones((3, 2)))
    np.testing.assert_allclose(regression(x.T @ x / 5000, x.T @ x / 5000), np.eye(7), atol=1e-12)


def test_what_some_tokens_tell_is_carried_over_to_all():
    """If x' = B x + rest with one B everywhere, moments of x' over all tokens follow from few of them."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((40_000, 6)) @ generator.standard_normal((6, 6))
    x[:2000] *= 2.0  # what the few tokens read is not typical
    y = x @ (np.eye(6) + 0.3 * generator.standard_normal((6, 6))) + 0.2 * generator.standard_normal(x.shape)
    few = x[:2000].T @ x[:2000] / 2000, x[:2000].T @ y[:2000] / 2000, y[:2000].T @ y[:2000] / 2000
    moment, cross = carried_over(x.T @ x / len(x), *few)
    for ours, true, of_few in ((moment, y.T @ y / len(x), few[2]), (cross, x.T @ y / len(x), few[1])):
        assert np.linalg.norm(ours - true) < 0.05 * np.linalg.norm(true) < 0.05 * np.linalg.norm(of_few - true)
    # The sample is all tokens: exactly theirs.
    whole = x.T @ x / len(x), x.T @ y / len(x), y.T @ y / len(x)
    np.testing.assert_allclose(
        carried_over(whole[0], *whole)[0], whole[2], rtol=0.02, atol=0.02 * np.abs(whole[2]).max()
    )


def stream_error(model, compact):
    """Mean squared distance of what the last layer's MLP reads, relative to the dense model's."""
    tokens = random_tokens(240, seed=8).reshape(4, 60)
    read = []
    for m in (model, compact):
        _, sown = jax.jit(lambda p, m=m: m.decoder.apply({"params": p}, tokens, mutable=[BLOCK_INPUTS]))(m.params)
        read.append(np.asarray(inputs_by_site(sown[BLOCK_INPUTS]["layers"]["2"])["mlp_input"]))
    return np.square(read[0] - read[1]).sum() / np.square(read[0]).sum()


def test_activations_come_nearer_to_the_dense_ones():
    """With G the identity what is minimised is the distance of outputs; ranks are the same."""
    found = {}
    for share in (0.0, 1.0):
        model = tiny_model("llama_untied")
        recipe = Recipe("svd_llm", keep=0.5, propagation=share)
        found[share] = convert(model, recipe, TOKENS, window=60, batch_size=4)
        if share:
            assert [g.rank for g in found[share].plan.groups] == [g.rank for g in found[0.0].plan.groups]
    model = tiny_model("llama_untied")
    assert stream_error(model, found[1.0]) < 0.97 * stream_error(model, found[0.0])


def test_a_share_of_nothing_is_no_change():
    _, plain = converted(0.0, rounds=0)
    _, some = converted(1e-9, rounds=0)
    assert [g.rank for g in some.plan.groups] == [g.rank for g in plain.plan.groups]
    assert some.plan.dense == plain.plan.dense
    tokens = random_tokens(30, seed=3)[None]
    here, there = (np.asarray(forward(m.params, tokens, decoder=m.decoder)[0]) for m in (plain, some))
    np.testing.assert_allclose(there, here, atol=2e-3 * np.abs(here).max())


def test_full_rank_stays_exact():
    model = tiny_model("llama_untied")
    recipe = Recipe("ngc", "qkv-o-ug-d", rank="full", propagation=1.0, rounds=0)
    compact = convert(model, recipe, TOKENS, window=60, batch_size=4)
    tokens = random_tokens(30, seed=3)[None]
    dense, full = (np.asarray(forward(m.params, tokens, decoder=m.decoder)[0]) for m in (model, compact))
    assert np.abs(full - dense).max() / np.abs(dense).max() < 2e-3


def test_as_many_tokens_as_asked_for_are_propagated_on():
    model, recipe = tiny_model("llama_untied"), Recipe("svd_llm", keep=0.5)
    statistics = list(measured(model, recipe, TOKENS, window=60, batch_size=4))
    compact = convert(model, recipe, TOKENS, window=60, batch_size=4)
    recipe = Recipe("svd_llm", keep=0.5, propagation=0.5)
    by_hand = propagated(model, recipe, compact, statistics, TOKENS[:300], window=60, batch_size=4)
    made = convert(model, recipe, TOKENS, propagation_tokens=300, window=60, batch_size=4)
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_dense_inputs_moments_need_not_be_measured_twice():
    """Gradients and propagation on the same tokens, and on the same with what is known of them withheld."""
    model, recipe = tiny_model("llama_untied"), Recipe("ngc", keep=0.5, rounds=0, propagation=0.5, keep_neurons=1.0)
    settings = {"gradient_tokens": 300, "window": 60, "batch_size": 4}
    statistics = list(measured(model, recipe, TOKENS, held=True, first=True, **settings))
    for layer, alone in zip(statistics, measured(model, Recipe("svd_llm"), TOKENS[:300], window=60), strict=True):
        for name, entry in layer.items():
            assert (entry.count, entry.first.count) == (len(TOKENS), 300)
            np.testing.assert_allclose(entry.first.second_moment, alone[name].second_moment, rtol=1e-4, atol=1e-5)
    made = convert(model, recipe, TOKENS, propagation_tokens=300, **settings)
    compact = convert(model, recipe.replace(propagation=0.0), TOKENS, **settings)
    withheld = [{name: dataclasses.replace(s, first=None) for name, s in layer.items()} for layer in statistics]
    by_hand = propagated(model, recipe, compact, withheld, TOKENS[:300], window=60, batch_size=4)
    assert made.plan == by_hand.plan
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3 * np.abs(theirs).max())
    # It is what is known that is used, on just these tokens.
    false = [
        {n: dataclasses.replace(s, first=FirstTokens(300, np.eye(len(s.second_moment)))) for n, s in layer.items()}
        for layer in statistics
    ]
    for tokens, is_used in ((TOKENS[:300], True), (TOKENS[:240], False)):
        misled, right = (
            propagated(model, recipe, compact, s, tokens, window=60, batch_size=4) for s in (false, withheld)
        )
        pairs = list(zip(jax.tree.leaves(misled.params), jax.tree.leaves(right.params), strict=True))
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs) != is_used


@pytest.mark.parametrize(
    ("topology", "units"),
    [
        ("q-k-v-o-u-g-d", [{"q", "k", "v"}, {"o"}, {"u", "g"}, {"d"}]),
        ("qkv-o-ug-d", [{"q", "k", "v"}, {"o"}, {"u", "g"}, {"d"}]),
        ("qug-kv-o-d", [{"q", "k", "v", "u", "g"}, {"o"}, {"d"}]),
        ("qu-k-v-go-d", [{"q", "k", "v", "u", "g", "o"}, {"d"}]),
    ],
)
def test_groups_of_different_inputs_are_fitted_side_by_side(topology, units):
    """But for those with a group between them; the outcome is that of fitting all of a layer's groups together."""
    model = tiny_model("llama_untied")
    recipe = Recipe("ngc", topology, keep=0.5, propagation=0.5, rounds=0)
    groups = [(group, 2) for group in all_candidates(candidate_cells(model.config, topology))]
    groups = [(group, rank) for group, rank in groups if group.members[0].name.startswith("layers.1.")]
    found = [
        {member.name.split(".")[-1] for group, _ in some for member in group.members} for _, some in _by_input(groups)
    ]
    assert sorted(map(sorted, found)) == sorted(map(sorted, units))

    statistics = list(measured(model, recipe, TOKENS, window=60, batch_size=4, held=True))[1]
    moments, params, moved = {}, {}, {}
    for role, site in INPUT_SITE.items():
        own = statistics[block_name(1, role)].second_moment
        moments[site] = [own, 0.9 * own, 1.1 * own]
        for name, (target, entry) in _moved(model, 1, site, statistics, moments[site], 0.5).items():
            moved[name] = entry
            params[(*name.split("."), "kernel")] = target
    members = [[moved[member.name] for member in group.members] for group, _ in groups]
    together = fit_all([g for g, _ in groups], factorise_of(recipe), unflatten_dict(params), members, [2] * len(groups))
    apart = _refit(model, (factorise_of(recipe), 0.5), 1, statistics, moments, groups)
    for (group, _), expected in zip(groups, together, strict=True):
        for ours, theirs in zip(apart[group.name].states.weights(), expected.states.weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def test_groups_across_layers_are_refused():
    for topology in ("qq-kk-vv", "auto"):
        with pytest.raises(UsageError, match="may span layers"):
            converted(0.5, topology, rounds=0)


def test_a_group_of_the_first_layer_is_fitted_as_before():
    """Nothing below it changed its input; only shrinkage of correlations could tell, and both sides have it."""
    model = tiny_model("llama_untied")
    recipe = Recipe("svd_llm", keep=0.5)
    tokens = TOKENS[:600]
    statistics = list(measured(model, recipe, tokens, window=60, batch_size=4))
    compact = convert(model, recipe, tokens, window=60, batch_size=4)
    recipe = Recipe("svd_llm", keep=0.5, propagation=1.0)
    again = propagated(model, recipe, compact, statistics, tokens, window=60, batch_size=4)
    group = all_candidates(candidate_cells(model.config, "q-k-v-o-u-g-d"))[0]
    name = group.members[0].name
    assert name == "layers.0.attn.q"
    rank = again.plan.groups[0].rank
    (fitted,) = fit_all([group], factorise_of(recipe), model.params, [[statistics[0][name]]], [rank])
    expected = fitted.states.truncated(rank).weights()[0]
    found = weights(again.plan.groups[0].kernel, again.params["groups"][group.name], name)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
