"""The form dense: a plain architecture at a keep ratio, with what remains refitted."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.conversion import Recipe, chain, convert, factorise, propagate_errors, prune_neurons
from ngc_jax.conversion.dense_refit import estimate
from ngc_jax.conversion.methods import DENSE_FORMS
from ngc_jax.errors import UsageError
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from ngc_jax.planning.widths import plan_dense
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(1200)


def logits(model, tokens=TOKENS[:60]):
    return np.asarray(forward(model.params, jnp.asarray(tokens)[None], decoder=model.decoder)[0])


def made(family="llama_untied", keep=0.7, **options):
    return convert(
        tiny_model(family), Recipe("ngc", keep=keep, form="dense", **options), TOKENS, window=60, batch_size=2
    )


SLOW = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("gemma3", "granite", "cohere2", "glm4", "starcoder2", "gpt_neox", "gpt2")
]


@pytest.mark.parametrize("family", ["llama_untied", *SLOW])
def test_a_model_of_the_architecture_that_is_refitted_and_saved(family, tmp_path):
    dense, refitted = tiny_model(family), made(family)
    assert refitted.plan.groups == ()
    assert refitted.plan.keep_ratio() <= 0.7
    width = "n_inner" if family == "gpt2" else "intermediate_size"
    assert refitted.hf_config[width] == refitted.config.mlp_dim < dense.config.mlp_dim
    # The next wider one stores too much.
    wider = dataclasses.replace(dense.config, mlp_dim=refitted.config.mlp_dim + 8)
    stored = sum(block.parameters for block in wider.blocks())
    assert stored > 0.7 * sum(block.parameters for block in dense.config.blocks())
    # On the calibration text it is nearer to the dense model than without the refit.
    expected = logits(dense)
    far = np.square(logits(made(family, propagation=0)) - expected).mean()
    assert np.square(logits(refitted) - expected).mean() < far
    save_model(refitted, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == dense.hf_config["model_type"]
    with open_source(str(tmp_path / "model")) as source:
        assert inspect_model(source).summary()["keep_ratio"] == refitted.plan.keep_ratio()
    np.testing.assert_array_equal(logits(load_model(str(tmp_path / "model"))), logits(refitted))
    assert f"{refitted.config.mlp_dim} hidden neurons" in (tmp_path / "model" / "README.md").read_text()


def test_nothing_is_pruned_and_nothing_changes_at_one():
    np.testing.assert_array_equal(logits(made(keep=1.0)), logits(tiny_model("llama_untied")))


def test_the_estimate_is_least_squares():
    """Of both sets of tokens together, weighted; by NumPy's own least squares."""
    rng = np.random.default_rng(0)
    w, c, x, target = (rng.standard_normal(shape) for shape in ((5, 7), (90, 7), (80, 7), (80, 5)))
    moments = c.T @ c / 90, target.T @ x / 80, x.T @ x / 80
    found = estimate(w, *moments, strength=0.4, shrinkage=0.0)
    rows = np.concatenate([x * np.sqrt(0.4 / 80), c * np.sqrt(0.6 / 90)])
    wanted = np.concatenate([target * np.sqrt(0.4 / 80), c @ w.T * np.sqrt(0.6 / 90)])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, atol=1e-5)
    np.testing.assert_allclose(estimate(w, *moments, strength=0.0, shrinkage=0.0), w, atol=1e-9)
    # An input without any energy keeps its weight.
    silent = [moments[0].copy(), moments[1].copy(), moments[2].copy()]
    for moment in silent:
        moment[:, 3] = 0.0
    silent[0][3] = silent[2][3] = 0.0
    kept = estimate(w, *silent, strength=1.0, shrinkage=0.03)
    np.testing.assert_allclose(kept[:, 3], w[:, 3], atol=1e-9)


@pytest.mark.parametrize(
    ("keep", "multiple", "width"), [(0.8, None, 1120), (0.6, None, 704), (0.8, 128, 1024), (0.8, 1, 1126)]
)
def test_widths(keep, multiple, width):
    sizes = {"embed_dim": 576, "mlp_dim": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    config = dataclasses.replace(tiny_model("llama").config, **sizes)
    found = plan_dense(config, "q-k-v-o-u-g-d", keep, multiple)
    assert found.config.mlp_dim == width
    assert (
        keep - 0.75 * (multiple or 32) / 1536 < 1 - found.removed / sum(b.parameters for b in config.blocks()) <= keep
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "ngc", "keep": 0.2}, r"too low for form dense: .* raise it to at least 0\.\d+"),
        ({"method": "svd_llm"}, "no form dense, because it prunes no neurons; expected one of nystrom, ngc"),
        ({"method": "ngc", "keep_neurons": 0.5}, "leave out keep-neurons"),
        ({"method": "ngc", "rounds": 1}, "leave out rounds"),
        ({"method": "ngc", "gauge": True}, "factorises nothing"),
        ({"method": "ngc", "topology": "q-k-v-o"}, "add u, g and d"),
        ({"method": "ngc", "form": "grouped", "neuron_multiple": 8}, "is for form dense"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(how, words):
    recipe = {"form": "dense", "keep": 0.7, **how}
    with pytest.raises(UsageError, match=words):
        convert(tiny_model("llama_untied"), Recipe(**recipe), TOKENS)


def test_options_of_a_method_by_its_name():
    recipe = Recipe("nystrom", keep=0.7, form="dense")
    assert recipe.chain.passes == DENSE_FORMS["nystrom"](0.7).passes
    assert DENSE_FORMS["ngc"](0.7).options()["form"] == "dense"
    options = {"window": 60, "batch_size": 2}
    by_name = convert(tiny_model("llama_untied"), "nystrom", TOKENS, keep=0.7, form="dense", **options)
    own = chain(prune_neurons(), factorise("svd_llm", form="dense"))
    by_hand = convert(tiny_model("llama_untied"), own, TOKENS, keep=0.7, **options)
    np.testing.assert_array_equal(logits(by_name), logits(by_hand))
    with pytest.raises(UsageError, match="form is an option of a method"):
        convert(tiny_model("llama_untied"), own, TOKENS, keep=0.7, form="dense")
    with pytest.raises(UsageError, match="only prunes hidden neurons"):
        chain(factorise("ngc", form="dense"), propagate_errors(0.5))
