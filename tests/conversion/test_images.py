"""Conversion of image encoders: what is measured, and that methods give models that run, are counted and saved."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax import Calibration, chain, convert, factorise, prune_neurons
from ngc_jax.conversion.measure import measure
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.passes.quantise import quantise
from ngc_jax.conversion.state import Needs
from ngc_jax.conversion.statistics import measure_inputs
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.image_loss import image_losses, outputs_of
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.tiny import random_tokens, tiny_model
from tests.tiny_encoder import tiny_encoder, tiny_images

IMAGES = 24
TOKENS = 10  # of an image of 12 x 12


@cache
def encoder():
    return tiny_encoder()


@cache
def calibration() -> Calibration:
    return Calibration.of(encoder(), tiny_images(IMAGES), gradient_tokens=7 * TOKENS + 3, batch_size=5)


def perturbed_loss(model, pixels, targets):
    """The summed loss as a function of what is added to the outputs of the blocks of layer 1."""
    module, params = model.encoder, model.params
    zeros = module.init(jax.random.key(0), pixels)["perturbations"]

    def loss(moved):
        outputs = module.apply(
            {"params": params, "perturbations": {**zeros, "layers": {**zeros["layers"], "1": moved}}}, pixels
        )
        return image_losses(module, outputs, targets).sum()

    return loss, zeros["layers"]["1"]


def test_gradients_are_those_of_the_whole_model():
    """Against one automatic derivative of all layers, for images of which the last batch is padded."""
    made = calibration()
    some = made.tokens[: made.gradient_tokens]
    assert some.count == 7
    found, mean_loss = measure_output_gradients(
        encoder(), dataclasses.replace(made, tokens=some), GradientMeasurement(layers=[1], full_roles="qkvoud")
    )
    loss, zeros = perturbed_loss(encoder(), *map(jnp.asarray, some.images))
    np.testing.assert_allclose(mean_loss, loss(zeros) / len(some), rtol=1e-5)
    gradients = jax.grad(loss)(zeros)
    for part, role in [("attn", "q"), ("attn", "o"), ("mlp", "u"), ("mlp", "d")]:
        g = np.asarray(
            gradients[part][role]["output"][0]
            if isinstance(gradients[part][role]["output"], tuple)
            else gradients[part][role]["output"],
            np.float64,
        )
        g = g.reshape(-1, g.shape[-1])
        assert len(g) == len(some)
        measured = found[f"layers.1.{part}.{role}"].second_moment
        np.testing.assert_allclose(measured, g.T @ g / len(g), rtol=1e-3, atol=1e-6 * np.abs(g.T @ g).max())


def test_inputs_are_those_of_the_whole_model():
    """The second moment of the first layer's inputs, from the embeddings and the norm by themselves."""
    made, model = calibration(), encoder()
    _, statistics = next(measure_inputs(model, made))
    x = np.asarray(
        model.encoder.apply({"params": model.params}, made.tokens.images.pixels, method="embedded"), np.float64
    )
    norm = model.params["layers"]["0"]["attn_norm"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.config.norm_eps)
    x = (x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])).reshape(-1, x.shape[-1])
    np.testing.assert_allclose(statistics["layers.0.attn.q"].second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert statistics["layers.0.attn.q"].count == IMAGES * TOKENS


def test_one_pass_over_images_of_both_kinds_measures_the_same_inputs():
    """The images of the gradients are read first, and the others are added to their sums."""
    once = [layer for _, layer in measure_inputs(encoder(), calibration())]
    both = measure(encoder(), Needs(gradients="full", held=True), calibration())
    for one, other in zip(once, both, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name].second_moment, other[name].second_moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "svd_llm", "nystrom", "ngc_paper"])
def test_methods(method, tmp_path):
    model, held_out = encoder(), tiny_images(32, seed=9)
    compact = convert(model, method, tiny_images(IMAGES), keep=0.8)
    assert compact.plan.keep_ratio() <= 0.81
    found = outputs_of(compact.encoder, compact.params, held_out)
    again = load_model(str(save_model(compact, tmp_path / "compact")))
    assert again.plan == compact.plan
    np.testing.assert_array_equal(outputs_of(again.encoder, again.params, held_out), found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "siglip_vision_model"])
def test_the_default_method_keeps_more_than_the_plain_ones(family):
    """With and without a classifier; the outputs of the dense model are what is to be kept."""
    model, held_out = tiny_encoder(family), tiny_images(32, seed=9)
    expected = outputs_of(model.encoder, model.params, held_out)
    errors = {}
    for method in ("svd_llm", "ngc"):
        compact = convert(model, method, tiny_images(60), keep=0.8)
        found = outputs_of(compact.encoder, compact.params, held_out)
        errors[method] = np.square(found - expected).sum() / np.square(expected - expected.mean(0)).sum()
    assert errors["ngc"] < 0.5 * errors["svd_llm"]


def test_full_rank_is_the_dense_model():
    model, held_out = encoder(), tiny_images(8, seed=9)
    compact = convert(model, chain(factorise("svd_llm", rank="full")), tiny_images(IMAGES))
    expected = outputs_of(model.encoder, model.params, held_out)
    np.testing.assert_allclose(outputs_of(compact.encoder, compact.params, held_out), expected, atol=2e-4)


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip_vision_model"])
def test_pruned_models_are_plain_where_transformers_has_a_place_for_the_width(family, tmp_path):
    model, held_out = tiny_encoder(family), tiny_images(8, seed=9)
    pruned = convert(model, prune_neurons(0.8), tiny_images(IMAGES), keep=0.9)
    assert pruned.config.mlp_dim == 32
    again = load_model(str(save_model(pruned, tmp_path / "pruned")))
    expected = outputs_of(pruned.encoder, pruned.params, held_out)
    np.testing.assert_array_equal(outputs_of(again.encoder, again.params, held_out), expected)
    assert again.hf_config["model_type"] == family
    assert again.config == pruned.config
    text = (tmp_path / "pruned" / "config.json").read_text()
    assert ('"model_type": "ngc"' in text) == (family != "vit")


def test_a_model_without_a_classifier_has_targets_around_its_outputs():
    model = tiny_encoder("dinov2")
    made = Calibration.of(model, tiny_images(400), gradient_tokens=400 * TOKENS)
    pixels, targets = made.tokens.images
    outputs = outputs_of(model.encoder, model.params, pixels)
    distance = targets - outputs
    assert targets.shape == (400, 48)
    np.testing.assert_allclose([distance.mean(), distance.std()], [0, 1], atol=0.02)


def test_targets_are_classes_drawn_from_the_model_s_own_predictions():
    model = encoder()
    pixels = np.repeat(tiny_images(1), 4000, axis=0)
    made = Calibration.of(model, pixels, gradient_tokens=4000 * TOKENS)
    logits = outputs_of(model.encoder, model.params, pixels[:1])[0].astype(np.float64)
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = np.bincount(made.tokens.images.targets, minlength=5) / 4000
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert(encoder(), "ngc", "no such directory"), "no such directory"),
        (lambda: convert(encoder(), "ngc", np.zeros((2, 3, 8, 8), np.float32)), "8 x 8 pixels, and vit has positions"),
        (lambda: convert(encoder(), "ngc", np.zeros((2, 1, 12, 12), np.float32)), "of shape .2, 1, 12, 12."),
        (lambda: convert(encoder(), "ngc", np.zeros((2, 3, 12, 12), np.uint8)), "whole numbers; expected preprocessed"),
        (lambda: convert(encoder(), "ngc", np.full((2, 3, 12, 12), np.nan, np.float32)), "not finite"),
        (lambda: convert(encoder(), "ngc"), "reads images"),
        (lambda: convert(encoder(), "ngc", tiny_images(2), window=8), "window is for texts"),
        (lambda: convert(encoder(), "ngc", tiny_images(2), bos="always"), "bos is for texts"),
        (lambda: convert(encoder(), chain(quantise(bits=8)), tiny_images(2)), "not quantised yet"),
        (lambda: convert(encoder(), "svd", tiny_images(2), refine_tokens=9), "not refined yet"),
        (lambda: convert(encoder(), "ngc", tiny_images(2), cache_ratio=0.5), "no key-value cache"),
        (lambda: convert(tiny_model(), "svd_llm", calibration()), "is a language model, and images were given"),
        (
            lambda: convert(encoder(), "svd_llm", Calibration.of(tiny_model(), random_tokens(60), window=16)),
            "is an image encoder, and no images were given",
        ),
        (lambda: encoder().load_tokenizer(), "is an image encoder, which reads no text"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call()
