"""Windows shared out over devices: the same statistics and the same model as on one."""

import dataclasses

import jax
import numpy as np
import pytest

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.models.layerwise import layer_module, run_stack, stack_batches
from ngc_jax.training.sharding import make_mesh
from tests.conversion.helpers import measured, remeasured_of
from tests.tiny import forward, random_tokens, tiny_model

# Seven windows of 20, the last of which is short: of three devices' batches, some have nothing but padding.
TOKENS = random_tokens(130)
RECIPE = Recipe("ngc", keep=0.6)


def mesh_of(count):
    return make_mesh(devices=jax.local_devices()[:count])


def on_all(model, mesh):
    return jax.device_put(model.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, entry in one.items():
            for array, wanted in zip(fields(entry), fields(other[name]), strict=True):
                np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def fields(entry):
    return [entry.second_moment, entry.absolute_mean, entry.gradients.second_moment, entry.gradients.mean_square]


@pytest.mark.parametrize("held", [False, True])
def test_statistics_do_not_depend_on_how_many_devices_measure_them(held):
    model = tiny_model("llama_untied")
    options = {"gradient_tokens": 70, "window": 20, "batch_size": 2, "held": held}
    expected = list(measured(model, RECIPE, TOKENS, **options))
    mesh = mesh_of(3)
    placed = dataclasses.replace(model, params=on_all(model, mesh))
    found = list(measured(placed, RECIPE, TOKENS, mesh=mesh, **options))
    assert_same(found, expected)


def test_what_is_measured_again_does_not_either():
    model, recipe = tiny_model(), RECIPE.replace(keep_neurons=1.0)
    statistics = list(measured(model, recipe, TOKENS, window=20))
    once = recipe.replace(rounds=0, propagation=0.0)
    compact = convert(model, once, TOKENS, window=20)
    found = [
        remeasured_of(model, recipe, compact, statistics, TOKENS, window=20, mesh=mesh) for mesh in (None, mesh_of(4))
    ]
    assert_same(found[1], found[0])


def test_a_conversion_with_all_levers_makes_the_same_model():
    model = tiny_model()
    one, several = (convert(model, RECIPE, TOKENS, window=20, mesh=mesh) for mesh in (None, mesh_of(4)))
    assert one.plan == several.plan
    logits = [np.asarray(forward(m.params, TOKENS[None, :40], decoder=m.decoder)[0]) for m in (one, several)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3 * np.abs(logits[0]).max())


def test_devices_work_on_their_own_windows_only():
    """The compiled layer has no array of all windows on any device."""
    model, mesh = tiny_model(), mesh_of(4)
    (stack,) = stack_batches(TOKENS, 20, 2, mesh=mesh)
    x = jax.device_put(np.zeros((*stack.tokens.shape, model.config.embed_dim), np.float32), stack.tokens.sharding)
    params = on_all(model, mesh)["layers"]["0"]
    layer = layer_module(model.decoder, 0)
    lowered = run_stack.lower(params, x, stack.positions, layer=layer, mesh=mesh)
    text = lowered.compile().as_text()
    assert "all-gather" not in text
    after = run_stack(params, x, stack.positions, layer=layer, mesh=mesh)
    assert after.sharding.is_equivalent_to(stack.tokens.sharding, x.ndim)
