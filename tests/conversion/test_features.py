"""Conversions of models with features that a plain one lacks: the same as of an equal model without the feature."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.conversion import Recipe, convert
from ngc_jax.models.config import DecoderConfig
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(900)
RECIPES = {
    "form dense": Recipe("ngc", keep=0.7, form="dense", propagation=0.5),
    "rounds and propagation": Recipe("ngc", keep=0.6, propagation=0.5),
}


def converted_logits(model, recipe):
    made = convert(model, recipe, TOKENS, window=60, batch_size=2, bos="never")
    return np.asarray(forward(made.params, jnp.asarray(TOKENS[:60])[None], decoder=made.decoder)[0])


@pytest.mark.parametrize("name", ["form dense", pytest.param("rounds and propagation", marks=pytest.mark.slow)])
def test_a_residual_multiplier_is_a_scale_of_the_matrices_that_write(name):
    model = tiny_model("granite")
    hf_config = {**model.hf_config, "residual_multiplier": 1.0}
    layers = {
        number: {
            **layer,
            **{
                part: {**layer[part], role: {"kernel": layer[part][role]["kernel"] * model.config.residual_scale}}
                for part, role in (("attn", "o"), ("mlp", "d"))
            },
        }
        for number, layer in model.params["layers"].items()
    }
    scaled = dataclasses.replace(
        model, config=DecoderConfig.from_hf(hf_config), hf_config=hf_config, params={**model.params, "layers": layers}
    )
    found, expected = (converted_logits(one, RECIPES[name]) for one in (model, scaled))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * expected.std())
