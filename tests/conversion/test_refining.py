"""Refining: the direction of a step, what it trains and leaves, on which tokens, on how many devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ngc_jax.conversion import Calibration, Recipe, chain, convert, factorise, prune_neurons, quantise, refine
from ngc_jax.conversion.refining import step_windows
from ngc_jax.errors import UsageError
from ngc_jax.training.sharding import make_mesh
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(800)
OPTIONS = {"window": 40, "bos": "never"}


def divergence(dense, params, compact, tokens):
    """KL(dense || compact) in nats per predicted token, from logits."""
    before = jax.nn.log_softmax(forward(dense.params, tokens, decoder=dense.decoder)[0][:, :-1])
    after = jax.nn.log_softmax(forward(params, tokens, decoder=compact.decoder)[0][:, :-1])
    return (jnp.exp(before) * (before - after)).sum(-1).mean()


def windows(tokens=TOKENS):
    return tokens[: len(tokens) // 40 * 40].reshape(-1, 40)


def test_the_first_step_goes_against_the_gradient_of_the_divergence():
    """Adam's first step is the learning rate times the sign of each derivative."""
    dense, rate = tiny_model("llama_untied"), 1e-4
    start = convert(dense, chain(factorise("svd")), keep=0.5)
    # 480 tokens: all of the text, in one step.
    tokens = TOKENS[:480]
    after = convert(dense, chain(factorise("svd"), refine(480, rate)), tokens, keep=0.5, **OPTIONS)
    gradient = jax.grad(lambda params: divergence(dense, params, start, windows(tokens)))(start.params)
    flat, old, new = (flatten_dict(dict(tree)) for tree in (gradient, start.params, after.params))
    for path in old:
        moved = np.asarray(new[path]) - np.asarray(old[path])
        if path[0] not in ("groups", "layers"):
            np.testing.assert_array_equal(moved, 0)
            continue
        clear = np.abs(flat[path]) > 1e-4 * np.abs(flat[path]).max()
        np.testing.assert_allclose(moved[clear], -rate * np.sign(flat[path])[clear], rtol=2e-2, atol=2e-7)


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        (Recipe("ngc", keep=0.6, refine_rate=1e-3), False),
        (Recipe("ngc", keep=0.7, form="dense", refine_rate=1e-3), True),
        # Pruned as statistics are read: dense weights would be given away at once.
        (Recipe("nystrom", keep=0.6, keep_neurons=0.8, refine_rate=1e-3), False),
    ],
)
def test_a_refined_model_is_nearer_to_the_dense_one(recipe, kept):
    """On all windows, from either form; the weights given away are those that the teacher still needs."""
    dense, text = tiny_model("llama_untied"), random_tokens(2000)
    before = {path: np.array(leaf) for path, leaf in flatten_dict(dict(dense.params)).items()}
    start = convert(dense, recipe.replace(refine_tokens=0), text, **OPTIONS)
    after = convert(dense, recipe, text, donate=True, **OPTIONS)
    old, new = (float(divergence(dense, one.params, one, windows(text))) for one in (start, after))
    assert new < 0.95 * old
    assert after.plan == start.plan
    assert bool(after.plan.groups) != kept
    for path, leaf in flatten_dict(dict(dense.params)).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_parameters_keep_their_type_and_the_same_arguments_give_the_same_model():
    dense = tiny_model()
    half = dataclasses.replace(dense, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense.params))
    once, twice = (convert(half, "svd_llm", TOKENS, keep=0.6, refine_tokens=400, **OPTIONS) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once.params), jax.tree.leaves(twice.params), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)


def test_windows_of_a_step_are_shared_out_over_devices(monkeypatch):
    """One step of two windows: on two devices, and on one that takes as many tokens a step."""
    dense, how = tiny_model("llama_untied"), chain(factorise("svd_llm"), refine(800, 1e-4))
    both = Calibration.of(dense, TOKENS, window=400, bos="never", mesh=make_mesh(devices=jax.local_devices()[:2]))
    shared = convert(dense, how, both, keep=0.5)
    monkeypatch.setattr("ngc_jax.conversion.refining._STEP", 800)
    alone = convert(dense, how, dataclasses.replace(both, mesh=None), keep=0.5)
    start = convert(dense, chain(factorise("svd_llm")), dataclasses.replace(both, mesh=None), keep=0.5)
    found, expected, before = (flatten_dict(dict(one.params)) for one in (shared, alone, start))
    for path in found:
        # Adam's first step is a sign: derivatives near 0 may differ in it.
        same = np.abs(np.asarray(found[path]) - np.asarray(expected[path])) < 1e-6
        assert same.mean() > 0.99, path
    assert any(not np.array_equal(found[path], before[path]) for path in found)


def test_windows_come_from_the_end_in_an_order_of_their_own():
    text = Calibration(np.arange(10_000), window=300)
    steps = step_windows(text, 3000)
    assert {step.shape for step in steps} == {(1, 300)}
    firsts = [int(step[0, 0]) for step in steps]
    assert sorted(firsts) == list(range(9900 - 10 * 300, 9900, 300))
    assert firsts != sorted(firsts)
    assert step_windows(text, 10**9)[0].shape == (1, 300)
    assert len(step_windows(text, 10**9)) == 33
    assert [step.shape for step in step_windows(Calibration(np.arange(90), window=40), 1)] == [(2, 40)]
    assert [step.shape for step in step_windows(Calibration(np.arange(30), window=40), 64)] == [(1, 30)]
    with pytest.raises(UsageError, match="at least 2 tokens"):
        step_windows(Calibration(np.arange(1)), 64)


def test_chains_that_cannot_be_refined_are_refused():
    with pytest.raises(UsageError, match="add factorise before it"):
        chain(prune_neurons(0.8), refine())
    with pytest.raises(UsageError, match="add factorise before it"):
        Recipe("dense", refine_tokens=100)
    with pytest.raises(UsageError, match="put quantise last"):
        chain(factorise("svd"), quantise(8), refine())
    with pytest.raises(UsageError, match="refine-rate 0 is outside"):
        refine(100, 0.0)
    with pytest.raises(UsageError, match="refine-tokens -1 is below 0"):
        refine(-1)
    with pytest.raises(UsageError, match="reads a text; give one"):
        convert(tiny_model(), chain(factorise("svd"), refine()), keep=0.5)
    names = [one.name for one in Recipe("ngc", refine_tokens=9, bits=4).chain]
    assert names[-3:] == ["propagate_errors", "refine", "quantise"]
