import dataclasses

import numpy as np
import pytest

from ngc_jax.conversion import Calibration, Recipe
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.remeasuring import (
    dense_layer,
    mixed_share,
    predicted_slope,
    sensitivity_corrections,
    tokens_again,
)
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.models.load import kernel_of
from tests.conversion.helpers import measured, remeasured_of
from tests.tiny import forward, random_tokens, tiny_model

ENOUGH = 10**12  # tokens: slopes without noise


def logits(model, tokens):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def test_the_second_round_takes_other_tokens_where_there_are_some():
    tokens = np.arange(100)
    np.testing.assert_array_equal(tokens_again(tokens, 60), np.arange(60, 90))
    np.testing.assert_array_equal(tokens_again(tokens, 90), np.arange(55, 100))
    np.testing.assert_array_equal(tokens_again(tokens[:20], 60), np.arange(20))
    assert len(tokens_again(np.arange(65_536), 24_576)) == 8192  # no more, however many the dense model's are taken on


@pytest.mark.parametrize("geometry", ["full", "diagonal"])
def test_the_second_round_measures_the_converted_model(geometry):
    model, tokens = tiny_model(), random_tokens(120)
    recipe = Recipe("ngc", keep=0.4, gradients=geometry, keep_neurons=1.0)
    statistics = list(measured(model, recipe, tokens, window=40))
    once = convert(model, recipe.replace(rounds=0), tokens, window=40)
    again = remeasured_of(model, recipe, once, statistics, tokens[:40], window=40)
    formed = {layer: dense_layer(model, once, layer) for layer in range(model.config.num_layers)}
    now, _ = measure_output_gradients(
        model, Calibration(tokens[:40], window=40), GradientMeasurement(slopes=True), layer_params=formed.__getitem__
    )
    blocks = {name: entry for layer in statistics for name, entry in layer.items()}
    whole = {**model.params, "layers": {str(layer): params for layer, params in formed.items()}}
    dense = {name: np.asarray(kernel_of(model.params, name), np.float64) for name in blocks}
    change = {name: kernel_of(whole, name) - dense[name] for name in blocks}
    predicted = {name: predicted_slope(dense[name], change[name], entry) for name, entry in blocks.items()}
    factors = sensitivity_corrections(predicted, {name: now[name].slope for name in blocks}, 40)
    assert max(factors.values()) > 1.2 * min(factors.values())
    plain = remeasured_of(model, recipe, once, statistics, tokens[:40], sensitivities=False, window=40)
    share = mixed_share(once.plan.keep_ratio())
    assert 0.4 < share < 0.6
    for before, after, uncorrected in zip(statistics, again, plain, strict=True):
        for name in before:
            expected = (1 - share) * before[name].gradients.mean_square + share * now[name].mean_square
            np.testing.assert_allclose(uncorrected[name].gradients.mean_square, expected, rtol=1e-5)
            np.testing.assert_allclose(after[name].gradients.mean_square, factors[name] ** 0.5 * expected, rtol=1e-5)
            assert after[name].second_moment is before[name].second_moment
    # The formed layers compute what the groups compute.
    np.testing.assert_allclose(
        logits(dataclasses.replace(model, params=whole), tokens[:20]), logits(once, tokens[:20]), atol=1e-4
    )


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 8), (8, 5)])
@pytest.mark.parametrize("geometry", ["full", "diagonal"])
def test_a_quadratic_loss_has_the_predicted_slope(outputs, inputs, geometry):
    """The derivative by t, at 1, of E[|A (W + t D) x - A W x|^2] / 2: numerically, from samples."""
    generator = np.random.default_rng(0)
    weight, x = generator.standard_normal((outputs, inputs)), generator.standard_normal((50, inputs))
    root = generator.standard_normal((outputs, outputs))
    if geometry == "diagonal":
        root = np.diag(np.diag(root))
    # As states make it: from fewer directions of the inputs, through W.
    change = weight @ generator.standard_normal((inputs, 2)) @ generator.standard_normal((2, inputs))
    metric = root.T @ root
    second = None if geometry == "diagonal" else metric if outputs <= inputs else weight.T @ metric @ weight
    statistics = Statistics(50, x.T @ x / 50, np.abs(x).mean(0), None, OutputGradients(50, np.diag(metric), second))

    def loss(t):
        return np.square(root @ (t * change) @ x.T).sum() / 2 / 50

    slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
    assert predicted_slope(weight, change, statistics) == pytest.approx(slope, rel=1e-6)


def names(layers=4):
    return [f"layers.{layer}.{part}" for layer in range(layers) for part in ("attn.q", "attn.k", "mlp.u")]


def test_corrections_are_a_layer_s_times_a_role_s():
    generator = np.random.default_rng(1)
    layer, role = generator.uniform(0.5, 2, 4), dict(zip("qku", (0.5, 1.0, 1.7), strict=True))
    predicted = dict(zip(names(), generator.uniform(0.1, 1, 12), strict=True))
    truth = {name: layer[int(name.split(".")[1])] * role[name[-1]] for name in predicted}
    # A block that stayed dense says nothing, and is corrected as its layer and its role are.
    predicted["layers.2.attn.k"] = 0.0
    measured = {name: truth[name] * predicted[name] for name in predicted}
    factors = sensitivity_corrections(predicted, measured, ENOUGH)
    assert factors == pytest.approx(truth, rel=1e-6)


def test_corrected_predictions_sum_to_what_was_measured_however_noisy():
    generator = np.random.default_rng(2)
    predicted = dict(zip(names(), generator.uniform(0.5, 1, 12), strict=True))
    measured = {name: value * generator.uniform(0.2, 3) for name, value in predicted.items()}
    factors = sensitivity_corrections(predicted, measured, ENOUGH)
    for axis in (1, -1):
        for key in {name.split(".")[axis] for name in predicted}:
            some = [name for name in predicted if name.split(".")[axis] == key]
            assert sum(factors[n] * predicted[n] for n in some) == pytest.approx(sum(measured[n] for n in some))


def test_corrections_have_bounds():
    predicted = dict.fromkeys(names(), 1.0)
    measured = {name: -5.0 if ".0." in name else 1e6 if ".1." in name else 1.0 for name in predicted}
    factors = sensitivity_corrections(predicted, measured, ENOUGH)
    assert min(factors.values()) >= 0.01
    assert max(factors.values()) <= 100
    assert all(factors[name] > 0 for name in predicted)
    assert sensitivity_corrections(dict.fromkeys(names(), 0.0), measured, ENOUGH) == dict.fromkeys(names(), 1.0)


def test_corrections_are_trusted_as_far_as_slopes_are_measured():
    """Blocks whose true factors scatter, slopes with the noise that is assumed: nearer to the truth than raw ratios."""
    generator = np.random.default_rng(3)
    truth = dict(zip(range(300), generator.lognormal(0, 0.4, 300), strict=True))
    for size, tokens in ((1e-3, 8192), (1e-1, 8192), (1e-3, 100)):
        predicted = {f"layers.{layer}.mlp.u": size for layer in truth}
        noise = np.sqrt(2 * size / tokens) * generator.standard_normal(len(truth))
        measured = {f"layers.{layer}.mlp.u": truth[layer] * size + noise[layer] for layer in truth}
        factors = sensitivity_corrections(predicted, measured, tokens)
        found, raw = np.array(list(factors.values())), np.array(list(measured.values())) / size
        errors = [np.square(guess - list(truth.values())).mean() for guess in (found, raw, np.ones(len(truth)))]
        assert errors[0] < 1.1 * min(errors[1:])
    none = sensitivity_corrections(predicted, measured, 1)
    assert max(abs(factor - 1) for factor in none.values()) < 0.01
