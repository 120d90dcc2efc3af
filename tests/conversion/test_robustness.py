"""The default method on what models and calibration texts may be like: singular, silent, damaged, permuted."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import example, given
from hypothesis import strategies as st

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.closed_form import DAMPING, best_states, mean_diagonal, output_metric, pulled_metric
from ngc_jax.conversion.factorisations import FACTORISATIONS
from ngc_jax.conversion.fitting import fit_all
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.errors import UsageError
from ngc_jax.groups.gauge import free_gauge
from ngc_jax.models.load import kernel_of, load_model
from ngc_jax.models.save import save_model
from ngc_jax.planning.candidates import Candidate
from tests.conversion.helpers import factorise_of
from tests.models.compact import dense_model
from tests.tiny import forward, random_tokens

SHARED = "qq-kk-vv-o-uu-gg-dd"
TEXT = random_tokens(20, seed=9)


def compact(model, keep, tokens=120, topology=None, rounds=0, **levers):
    """Converted by `ngc`. Windows of one shape, whatever the text: one compiled function serves every test."""
    recipe = Recipe("ngc", topology, keep, rounds=rounds, **levers)
    return convert(model, recipe, random_tokens(tokens), window=min(5, tokens), batch_size=4)


def formed(model):
    """The kernel of every grouped block, from its group's states by NumPy."""
    kernels = {}
    for group in model.plan.groups:
        states = model.params["groups"][group.name]
        input_states = np.asarray(states["input_states"], np.float64)
        if group.pivots is not None:
            input_states = free_gauge(group.pivots, input_states, group.d_in)
        for member in group.members:
            output_states = np.asarray(states["output_states"][member.name], np.float64)
            kernels[member.name] = output_states @ input_states[: member.d_in].T
    return kernels


def with_kernels(model, kernels):
    """A dense model with some of its kernels replaced."""
    flat = dict(traverse_util.flatten_dict(dict(model.params)))
    for name, kernel in kernels.items():
        flat[(*name.split("."), "kernel")] = jnp.asarray(kernel, jnp.float32)
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(flat))


def logits(model):
    return np.asarray(forward(model.params, TEXT[None], decoder=model.decoder)[0][0])


def formed_logits(model):
    """The logits of a compact model, computed by the dense decoder of its width: it is compiled once for all."""
    params = {name: leaf for name, leaf in model.params.items() if name != "groups"}
    return logits(with_kernels(dataclasses.replace(model, plan=None, params=params), formed(model)))


def stored_parameters(model):
    """Numbers that a compact model really has for the blocks of its plan."""
    leaves = jax.tree.leaves(model.params.get("groups", {}))
    for block in model.plan.blocks():
        node = model.params
        for part in block.name.split("."):
            node = node.get(part, {})
        leaves += jax.tree.leaves(dict(node))
    return sum(leaf.size for leaf in leaves)


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("topology", [None, SHARED, "auto"])
@pytest.mark.parametrize("gauge", [True, False])
def test_what_is_stored_is_what_the_plan_says_and_never_above_the_keep_ratio(topology, gauge):
    dense = dense_model()
    total = sum(block.parameters for block in dense.config.blocks())
    previous = 0
    for keep in (0.3, 0.5, 0.8, 0.95):
        model = compact(dense, keep, topology=topology, gauge=gauge)
        assert {block.name for block in model.plan.blocks()} == {block.name for block in dense.config.blocks()}
        assert previous < stored_parameters(model) == model.plan.count_parameters() <= math.floor(keep * total)
        assert all((group.pivots is not None) == gauge for group in model.plan.groups)
        assert np.isfinite(formed_logits(model)).all()
        previous = stored_parameters(model)
    assert error(formed_logits(model), logits(dense)) < 0.3


@pytest.mark.parametrize("topology", [None, SHARED, "auto"])
def test_a_compact_model_computes_with_the_weights_that_its_states_make(topology):
    dense = dense_model()
    model = compact(dense, 0.5, topology=topology, rounds=1)
    found = logits(model)
    assert np.isfinite(found).all()
    assert error(found, formed_logits(model)) < 1e-4
    assert stored_parameters(model) == model.plan.count_parameters()
    assert model.plan.keep_ratio() <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_the_default_recipe_on_other_architectures(architecture):
    dense = dense_model(architecture)
    model = compact(dense, 0.6)
    assert stored_parameters(model) == model.plan.count_parameters() <= 0.6 * model.plan.dense_parameters()
    assert np.isfinite(formed_logits(model)).all()


@pytest.mark.parametrize("tokens", [2, 5, 120])
@pytest.mark.parametrize("topology", [None, SHARED, "auto"])
def test_keep_one_is_the_dense_model_itself(tokens, topology):
    dense = dense_model()
    model = compact(dense, 1.0, tokens, topology)
    assert model.plan.groups == ()
    assert {block.name for block in model.plan.dense} == {block.name for block in dense.config.blocks()}
    for block in dense.config.blocks():
        assert kernel_of(model.params, block.name) is kernel_of(dense.params, block.name)
    np.testing.assert_array_equal(logits(dataclasses.replace(model, plan=None)), logits(dense))


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("topology", [None, SHARED, "auto"])
def test_fewer_tokens_than_dimensions(tokens, topology):
    """Second moments are singular: the budget is spent all the same, and what was seen is kept well."""
    dense = dense_model()
    for keep in (0.4, 0.95):
        model = compact(dense, keep, tokens, topology)
        assert np.isfinite(formed_logits(model)).all()
        assert keep - 0.05 < model.plan.keep_ratio() <= keep
    assert error(formed_logits(model), logits(dense)) < 1


def test_silent_neurons_and_zero_kernels():
    """Dead rows and columns, an input that is always zero, and blocks whose output nothing reads."""
    dense = dense_model()
    kernels = {name: np.array(kernel_of(dense.params, name)) for name in (b.name for b in dense.config.blocks())}
    kernels["layers.0.mlp.u"][3] = 0
    kernels["layers.0.mlp.d"][:, [3, 7]] = 0
    kernels["layers.0.attn.q"][:, 5] = 0
    kernels["layers.1.attn.k"][[0, 1]] = 0
    # Nothing depends on q, k and v of this layer, whose gradients are zero.
    kernels["layers.1.attn.o"][:] = 0
    # This d reads nothing but zeros.
    kernels["layers.1.mlp.u"][:] = 0
    dense = with_kernels(dense, kernels)
    params = jax.tree.map(lambda leaf: leaf, dense.params)
    params["layers"]["1"]["mlp"]["u"]["bias"] *= 0
    params["layers"]["0"]["attn_norm"]["scale"] = params["layers"]["0"]["attn_norm"]["scale"].at[2].set(0)
    dense = dataclasses.replace(dense, params=params)
    for topology, keep in itertools.product((None, SHARED, "auto"), (0.3, 0.7)):
        model = compact(dense, keep, topology=topology)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
        assert np.isfinite(formed_logits(model)).all()
        assert stored_parameters(model) == model.plan.count_parameters() <= keep * model.plan.dense_parameters()
        ranks = {group.name: group.rank for group in model.plan.groups}
        if topology is None and keep < 0.5:
            assert [ranks[f"L1-{role}"] for role in "qkvo"] == [1] * 4
            assert min(ranks[f"L0-{role}"] for role in "qkvo") > 1
        for name in ("layers.1.attn.o", "layers.1.mlp.u"):
            if name in model.plan.group_of and len(model.plan.group_of[name].members) == 1:
                assert np.abs(formed(model)[name]).max() < 1e-6
    # The second round measures a model in which the same is silent.
    assert np.isfinite(formed_logits(compact(dense, 0.5, rounds=1))).all()


zeros = st.sampled_from(["nothing", "rows", "columns", "inputs", "outputs", "kernel", "moment", "gradients"])


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.lists(zeros, max_size=3), st.integers(0, 9))
def test_best_states_of_singular_problems(m, n, count, silent, seed):
    """Whatever is zero: states are finite, energies ordered, and no rank loses more than the best of that rank."""
    rng = np.random.default_rng(seed)
    w, x, g = rng.standard_normal((m, n)), rng.standard_normal((count, n)), rng.standard_normal((count, m))
    some_in, some_out = rng.random(n) < 0.5, rng.random(m) < 0.5
    for kind in silent:
        w[some_out if kind == "rows" else slice(0, m * (kind == "kernel"))] = 0
        w[:, some_in if kind == "columns" else slice(0, 0)] = 0
        x[:, some_in if kind == "inputs" else slice(0, n * (kind == "moment"))] = 0
        g[:, some_out if kind == "outputs" else slice(0, m * (kind == "gradients"))] = 0
    c, moment = x.T @ x / count, g.T @ g / count
    measured = OutputGradients(count, np.diag(moment).copy(), moment if m <= n else w.T @ moment @ w)
    states = best_states([w], c, [measured])
    assert states.rank == min(m, n)
    for array in (states.input_states, *states.output_states, states.energies):
        assert np.isfinite(array).all()
    assert (states.energies >= 0).all()
    assert (np.diff(states.energies) <= 0).all()
    damped = moment + DAMPING * (np.diag(moment).mean() or 1e-12) * np.eye(m)
    left = np.linalg.cholesky(damped).T
    values = np.linalg.svd(left @ w @ x.T / math.sqrt(count), compute_uv=False)
    scale = np.trace(damped) * np.trace(w @ w.T) * max(np.trace(c), 1e-3) + 1e-12
    for rank in range(1, min(m, n) + 1):
        (approximation,) = states.truncated(rank).weights()
        lost = np.square(left @ (approximation - w) @ x.T).sum() / count
        assert lost <= np.square(values[rank:]).sum() + 1e-7 * scale


# Sums that rounding leaves indefinite: of a member's latent second moment, and of both sides of the shared equations.
@example([3, 7, 2], 8, 75, True)
@example([4, 2], 8, 63, False)
@example([9, 4, 4], 8, 90, True)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=3), st.integers(2, 9), st.integers(0, 99), st.booleans())
def test_shared_states_of_singular_problems(outputs, n, seed, noisy):
    """Members that saw few tokens, other tokens, or nothing; sums in float32 leave second moments indefinite."""
    rng = np.random.default_rng(seed)
    ws, statistics = [], []
    for m in outputs:
        width, count = int(rng.integers(max(n - 2, 1), n + 1)), int(rng.integers(1, 9))
        w, x, g = rng.standard_normal((m, width)), rng.standard_normal((count, width)), rng.standard_normal((count, m))
        w, x, g = w * rng.integers(0, 5), x * rng.integers(0, 5), g * rng.integers(0, 5)
        c, moment = x.T @ x / count, g.T @ g / count
        if noisy:
            c = c.astype(np.float32).astype(np.float64) + 1e-8 * np.trace(c) * np.diag(rng.standard_normal(width))
        measured = OutputGradients(count, np.diag(moment).copy(), moment if m <= width else w.T @ moment @ w)
        ws.append(w)
        statistics.append(Statistics(count, c, np.abs(x).mean(0), gradients=measured))
    pulled = [pulled_metric(w, entry.gradients) for w, entry in zip(ws, statistics, strict=True)]

    def lost(states):
        """The loss, through the pulled metric: of W X in place of W it is that of X in place of the identity."""
        total = 0.0
        for w, approximation, entry in zip(ws, states.weights(), statistics, strict=True):
            wrong = approximation[:, : w.shape[1]] - w
            metric = output_metric(entry.gradients, len(w))
            if metric is None:  # only its damping is known apart from W
                metric = DAMPING * (entry.gradients.mean_square.mean() or 1e-12) * np.eye(len(w))
            total += np.trace(metric @ wrong @ entry.second_moment @ wrong.T)
        return total

    everything = sum(np.trace(h @ s.second_moment) for h, s in zip(pulled, statistics, strict=True))
    full = FACTORISATIONS["ngc"].function(ws, statistics, min(sum(outputs), max(w.shape[1] for w in ws)))
    # A direction that no token reached counts as if it had been, a little.
    unseen = sum(np.trace(h) * mean_diagonal(s.second_moment) for h, s in zip(pulled, statistics, strict=True))
    slack = 1e-5 * everything + 1e-7 * unseen
    assert (full.energies >= -slack).all()
    assert full.energies.sum() <= everything + slack
    for rank in range(1, full.rank + 1):
        states = FACTORISATIONS["ngc"].function(ws, statistics, rank)
        assert all(np.isfinite(array).all() for array in (states.input_states, *states.output_states))
        assert lost(states) <= everything - full.energies[:rank].sum() + slack


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("block", ["layers.0.attn.q", "layers.1.mlp.d"])
def test_weights_that_are_not_finite(value, block):
    dense = dense_model()
    kernel = np.array(kernel_of(dense.params, block))
    kernel[1, 2] = value
    with pytest.raises(UsageError, match="not finite"):
        compact(with_kernels(dense, {block: kernel}), 0.5)


@pytest.mark.parametrize("field", ["second_moment", "absolute_mean", "fisher", "mean_square", "gradients"])
@pytest.mark.parametrize("method", ["ngc", "svd_llm"])
def test_statistics_that_are_not_finite(field, method):
    dense = dense_model()
    block = dense.config.block(1, "d")
    parts = {
        "second_moment": np.eye(block.d_in),
        "absolute_mean": np.ones(block.d_in),
        "fisher": np.ones(block.d_in),
        "mean_square": np.ones(block.d_out),
        "gradients": np.eye(block.d_out),
    }
    group = Candidate("L1-d", (block,))

    def statistics():
        gradients = OutputGradients(9, parts["mean_square"], parts["gradients"])
        return Statistics(9, parts["second_moment"], parts["absolute_mean"], parts["fisher"], gradients)

    (fitted,) = fit_all([group], factorise_of(Recipe(method)), dense.params, [[statistics()]], [None])
    assert np.isfinite(fitted.states.energies).all()
    parts[field].flat[-1] = np.nan
    with pytest.raises(UsageError, match=r"statistics of layers\.1\.mlp\.d are not finite"):
        list(fit_all([group], factorise_of(Recipe(method)), dense.params, [[statistics()]], [None]))


@pytest.mark.parametrize("topology", [None, "qkv-o-ug-d"])
def test_the_order_of_mlp_neurons_does_not_matter(topology):
    dense = dense_model()
    order = np.random.default_rng(0).permutation(dense.config.mlp_dim)
    params = jax.tree.map(lambda leaf: leaf, dense.params)
    for layer in params["layers"].values():
        for role in "ug":
            layer["mlp"][role] = {name: leaf[order] for name, leaf in layer["mlp"][role].items()}
        layer["mlp"]["d"]["kernel"] = layer["mlp"]["d"]["kernel"][:, order]
    permuted = dataclasses.replace(dense, params=params)
    assert error(logits(permuted), logits(dense)) < 1e-5
    ours, theirs = (compact(model, 0.5, topology=topology) for model in (dense, permuted))
    assert [(g.name, g.rank) for g in ours.plan.groups] == [(g.name, g.rank) for g in theirs.plan.groups]
    expected = formed_logits(ours)
    assert error(expected, logits(dense)) > 1e-2
    assert error(formed_logits(theirs), expected) < 1e-2


@pytest.mark.parametrize("topology", [None, SHARED])
def test_saved_and_loaded(topology, tmp_path):
    model = compact(dense_model(), 0.5, topology=topology)
    loaded = load_model(str(save_model(model, tmp_path / "model")), dtype="float32")
    assert loaded.plan == model.plan
    assert all(group.pivots is not None for group in loaded.plan.groups)
    np.testing.assert_array_equal(logits(loaded), logits(model))
