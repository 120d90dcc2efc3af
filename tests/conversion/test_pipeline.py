import dataclasses

import jax
import numpy as np
import pytest

from ngc_jax.conversion import METHODS, Recipe
from ngc_jax.conversion.fisher import measure_fisher
from ngc_jax.conversion.fitting import shrunk, shrunk_in_place
from ngc_jax.conversion.pipeline import convert
from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import weights
from ngc_jax.groups.plan import Block, Plan
from ngc_jax.models.load import kernel_of
from ngc_jax.planning.ranks import uniform_rank
from tests.conversion.helpers import measured
from tests.tiny import HF_CONFIGS, forward, random_tokens, tiny_model


def logits(model, tokens):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def compact(model, method="ngc_one_sided", keep=None, topology=None, tokens=None, **levers):
    recipe = Recipe(method, topology, keep or 1.0, "full" if keep is None else None, **levers)
    tokens = random_tokens(120) if tokens is None else tokens
    return convert(model, recipe, tokens, window=40, batch_size=2)


@pytest.mark.parametrize("architecture", HF_CONFIGS)
def test_full_rank_reproduces_the_dense_logits(architecture):
    model, tokens = tiny_model(architecture), random_tokens(30, seed=9)
    dense, full = logits(model, tokens), logits(compact(model), tokens)
    assert np.abs(full - dense).max() / np.abs(dense).max() < 1e-3


@pytest.mark.parametrize("topology", ["qq-kk-vv-o-uu-gg-dd", "qkk-qvv-ugd", "kk-qv", "hybrid1"])
def test_full_rank_reproduces_the_dense_logits_across_layers(topology):
    model, tokens = tiny_model(), random_tokens(30, seed=9)
    dense, full = logits(model, tokens), logits(compact(model, topology=topology), tokens)
    assert np.abs(full - dense).max() / np.abs(dense).max() < 1e-3


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_every_method_converts_to_what_its_plan_says(method):
    model = tiny_model("llama_untied")
    result = compact(model, method, keep=0.5)
    assert result.plan is not None
    stored = sum(leaf.size for leaf in jax.tree.leaves(result.params["groups"]))
    biases = sum(member.d_out for group in result.plan.groups for member in group.members if member.bias)
    left_dense = sum(block.parameters for block in result.plan.dense)
    assert result.plan.count_parameters() == stored + biases + left_dense
    # ngc_paper rounds its ranks to the nearest whole number, as published.
    assert result.plan.keep_ratio() <= (0.53 if method == "ngc_paper" else 0.5)
    for block in result.plan.group_of:
        with pytest.raises(KeyError):
            kernel_of(result.params, block)
    assert np.isfinite(logits(result, random_tokens(10))).all()


def test_more_rank_is_less_error():
    model, tokens = tiny_model(), random_tokens(60, seed=3)
    dense = logits(model, tokens)
    errors = [np.square(logits(compact(model, keep=keep), tokens) - dense).mean() for keep in (0.2, 0.5, 0.8)]
    errors.append(np.square(logits(compact(model), tokens) - dense).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


def test_ngc_does_what_svd_llm_does_when_nothing_is_shared():
    model = tiny_model()
    ours, theirs = (compact(model, method, 0.5, topology="q-o-d") for method in ("ngc_one_sided", "svd_llm"))
    for group in ours.plan.groups:
        (member,) = group.members
        a, b = (weights(group.kernel, m.params["groups"][group.name], member.name) for m in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_blocks_that_no_group_names_are_untouched():
    model = tiny_model()
    result = compact(model, keep=0.5, topology="qkv")
    assert kernel_of(result.params, "layers.1.mlp.d") is kernel_of(model.params, "layers.1.mlp.d")
    assert result.params["embed"]["embedding"] is model.params["embed"]["embedding"]
    assert {block.name for block in result.plan.blocks()} == {
        f"layers.{layer}.attn.{role}" for layer in range(3) for role in "qkv"
    }


def test_progress_counts_to_its_end():
    model, seen = tiny_model(), {}
    convert(
        model,
        Recipe("ngc", rank=2, topology="qkv-o-ug-d", rounds=0),
        random_tokens(50),
        gradient_tokens=25,
        window=25,
        progress=lambda s, *a: seen.setdefault(s, []).append(a),
    )
    assert seen["fit"] == [(done, 12) for done in range(1, 13)]
    assert seen["calibrate"][-1] == (3, 3)
    assert seen["gradients"][-1] == (1, 1)


@pytest.mark.parametrize("gradient_tokens", [40, 80, 500])
def test_one_forward_pass_serves_gradients_and_inputs(gradient_tokens):
    """Whether or not all layers are held at once, the same tokens are counted, once each."""
    model, tokens = tiny_model(), random_tokens(150)
    settings = {"gradient_tokens": gradient_tokens, "window": 40, "batch_size": 4}

    def all_of(held):
        layers = measured(model, Recipe("ngc"), tokens, held=held, **settings)
        return {name: statistics for layer in layers for name, statistics in layer.items()}

    apart, together = all_of(False), all_of(True)
    assert list(apart) == list(together)
    for name, expected in apart.items():
        found = together[name]
        assert (found.count, found.gradients.count) == (150, min(gradient_tokens, 150))
        for ours, theirs in (
            (found.second_moment, expected.second_moment),
            (found.absolute_mean, expected.absolute_mean),
            (found.gradients.second_moment, expected.gradients.second_moment),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert together["layers.0.attn.q"].second_moment is together["layers.0.attn.v"].second_moment


def test_a_compact_model_is_not_converted_again():
    model = tiny_model()
    with pytest.raises(UsageError, match="compact model already"):
        convert(dataclasses.replace(model, plan=Plan()), Recipe("svd"), random_tokens(9))


def test_fisher_is_the_mean_square_gradient_of_each_window():
    model, tokens = tiny_model("qwen2"), random_tokens(33)

    def loss(params, window):
        logits, _ = model.decoder.apply({"params": params}, window[None])
        chosen = jax.nn.log_softmax(logits[0, :-1])[np.arange(len(window) - 1), window[1:]]
        return -chosen.mean()

    expected = {}
    for window in (tokens[:11], tokens[11:22], tokens[22:]):
        gradient = jax.grad(loss)(model.params, window)
        for block in model.config.blocks():
            square = np.square(np.asarray(kernel_of(gradient, block.name), np.float64)).sum(0)
            expected[block.name] = expected.get(block.name, 0) + square / 3
    measured = measure_fisher(model, tokens, window=11)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-3, atol=1e-12)


def test_uniform_rank_is_the_largest_that_fits():
    members = (Block("a", 30, 24), Block("b", 10, 24))
    assert uniform_rank(members, 0.5) == int(0.5 * 40 * 24 / 64)
    assert uniform_rank(members, 1.0) == 15
    assert uniform_rank(members, 0.5, round) == 8
    with pytest.raises(UsageError, match="leaves no rank for a, b"):
        uniform_rank(members, 0.01)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_ratio_outside_its_range(keep):
    with pytest.raises(UsageError, match="outside"):
        Recipe(keep=keep)


def test_a_donated_model_is_deleted_as_far_as_it_is_replaced():
    model, kept = tiny_model(), tiny_model()
    result = convert(model, Recipe("ngc", keep=0.5, topology="qkv-o"), random_tokens(60), window=30, donate=True)
    expected = convert(kept, Recipe("ngc", keep=0.5, topology="qkv-o"), random_tokens(60), window=30)
    tokens = random_tokens(20, seed=4)
    np.testing.assert_array_equal(logits(result, tokens), logits(expected, tokens))
    for block in model.config.blocks():
        grouped = block.name in result.plan.group_of
        assert kernel_of(model.params, block.name).is_deleted() == grouped
        assert not kernel_of(kept.params, block.name).is_deleted()


def test_shrinkage_keeps_the_diagonal():
    statistics = next(measured(tiny_model(), Recipe("svd_llm"), random_tokens(60), window=30))["layers.0.attn.q"]
    first, second = shrunk([statistics, statistics], 0.5)
    half = first.second_moment
    assert second.second_moment is half, "blocks with one input site share the result"
    np.testing.assert_array_equal(np.diag(half), np.diag(statistics.second_moment))
    np.testing.assert_allclose(half[0, 1:], statistics.second_moment[0, 1:] / 2)
    assert shrunk([statistics], 0.0)[0] is statistics
    shared = dataclasses.replace(statistics)
    found = shrunk_in_place({"q": statistics, "k": shared}, 0.5)
    np.testing.assert_array_equal(found["q"].second_moment, half)
    assert found["k"].second_moment is found["q"].second_moment is statistics.second_moment
