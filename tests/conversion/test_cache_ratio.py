"""Conversions within a budget of the key-value cache."""

import dataclasses

import numpy as np
import pytest

from ngc_jax.conversion import Recipe, convert
from ngc_jax.groups.kernels import weights
from ngc_jax.models.generate import generate
from ngc_jax.models.latent_cache import numbers_per_token
from ngc_jax.models.load import kernel_of
from tests.conversion.helpers import measured
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(240)
QUICK = {"rounds": 0, "propagation": 0.0}


def converted(architecture="llama", **options):
    recipe = Recipe("ngc", **{**QUICK, **options})
    return convert(tiny_model(architecture), recipe, TOKENS, bos="never", window=40, batch_size=2)


@pytest.mark.parametrize("architecture", ["llama_untied", "qwen3"])
def test_everything_else_stays_dense_at_keep_one(architecture):
    model, made = tiny_model(architecture), converted(architecture, keep=1.0, cache_ratio=0.4)
    assert {block.name.split(".")[-1] for block in made.plan.dense} == set("qougd")
    assert len(made.plan.dense) == 5 * 3
    np.testing.assert_array_equal(kernel_of(made.params, "layers.1.mlp.d"), kernel_of(model.params, "layers.1.mlp.d"))
    kept = numbers_per_token(made.config, made.plan, "latent")
    assert 0.37 < kept / numbers_per_token(made.config, None, "full") <= 0.4
    prompts = [np.arange(9), np.arange(30, 34)]
    full, latent = (
        generate(dataclasses.replace(made, cache=kind), prompts, max_new_tokens=20) for kind in ("full", "latent")
    )
    for one, other in zip(full, latent, strict=True):
        np.testing.assert_array_equal(one, other)


def expected_loss(model, made, statistics):
    """The sum over k and v of tr(G D C D^T) for D the error of a weight, with the damping of G that the fit has."""
    total = 0.0
    for layer in statistics:
        for name, entry in layer.items():
            group = made.plan.group_of.get(name)
            if group is None:
                continue
            formed = weights(group.kernel, made.params["groups"][group.name], name, pivots=group.pivots)
            error = np.asarray(formed, np.float64) - np.asarray(kernel_of(model.params, name), np.float64)
            metric = entry.gradients.second_moment + 0.1 * entry.gradients.mean_square.mean() * np.eye(len(error))
            total += np.trace(metric @ error @ entry.second_moment @ error.T)
    return total


def test_a_shared_latent_space_loses_no_more_than_private_ones_of_the_same_size():
    """Two latent spaces of ranks r and s are one of rank r + s, and the best of that rank is found."""
    model = tiny_model("llama_untied")
    # Without shrinkage, so that C is as measured.
    options = {"shrinkage": 0.0, "keep": 1.0}
    recipe = Recipe("ngc", "kv", cache_ratio=0.4, **options, **QUICK)
    statistics = list(measured(model, recipe, TOKENS, window=40, batch_size=2))
    losses = {}
    for topology in ("kv", "k-v"):
        made = converted("llama_untied", topology=topology, cache_ratio=0.4, **options)
        assert numbers_per_token(made.config, made.plan, "latent") <= 0.4 * 3 * 40
        losses[topology] = expected_loss(model, made, statistics)
    assert 0 < losses["kv"] < losses["k-v"]


def test_both_ratios_hold_with_every_pass():
    """Pruned neurons, gradients measured again, errors propagated."""
    made = converted(keep=0.7, cache_ratio=0.5, rounds=1, propagation=0.3)
    assert made.config.mlp_dim < tiny_model().config.mlp_dim
    assert made.plan.keep_ratio() <= 0.7
    assert numbers_per_token(made.config, made.plan, "latent") <= 0.5 * numbers_per_token(made.config, None, "full")
    assert np.isfinite(forward(made.params, TOKENS[None, :30], decoder=made.decoder)[0]).all()
