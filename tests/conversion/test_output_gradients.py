import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.conversion import Calibration
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.statistics import InputSums
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel, kernel_of
from tests.tiny import HF_CONFIGS, random_tokens, tiny_model, tiny_tokenizer

WINDOW = 16
# Two whole windows and a part of a third.
COUNT = 2 * WINDOW + 7


def no_perturbations(config, length):
    """Zeros to add to the output of every block, as the decoder's collection."""
    layers = {}
    for block in config.blocks():
        _, layer, part, role = block.name.split(".")
        zeros = {"output": jnp.zeros((1, length, block.d_out))}
        layers.setdefault(layer, {}).setdefault(part, {})[role] = zeros
    return {"layers": layers}


@functools.partial(jax.jit, static_argnames=("decoder", "loss"))
def whole_model_gradients(params, teacher, tokens, count, *, decoder, loss):
    """One window through the whole decoder at once: its summed loss, and the gradients by kernels and by outputs.

    What stands behind the first `count` tokens is neither scored nor read by those.
    """
    places = jnp.arange(len(tokens))

    def total(layers, moved):
        logits, _ = decoder.apply({"params": {**params, "layers": layers}, "perturbations": moved}, tokens[None])
        ours = jax.nn.log_softmax(logits[0])
        if loss == "teacher":
            theirs = jax.nn.log_softmax(decoder.apply({"params": teacher}, tokens[None])[0][0])
            return ((jnp.exp(theirs) * (theirs - ours)).sum(-1) * (places < count)).sum()
        return -(ours[places[:-1], tokens[1:]] * (places[1:] < count)).sum()

    moved = no_perturbations(decoder.config, len(tokens))
    return jax.value_and_grad(total, argnums=(0, 1))(params["layers"], moved)


def reference(model, tokens, params=None, loss="text"):
    """By block: gradients (T, d_out) of every token and the summed gradient by the kernel, float64; the mean loss."""
    params = params or model.params
    outputs, kernels, total = {}, {}, 0.0
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        padded = np.pad(window, (0, WINDOW - len(window)))
        value, (by_kernel, by_output) = whole_model_gradients(
            params, model.params, padded, len(window), decoder=model.decoder, loss=loss
        )
        total += float(value)
        for block in model.config.blocks():
            _, layer, part, role = block.name.split(".")
            gradient = np.asarray(by_output["layers"][layer][part][role]["output"][0], np.float64)
            outputs.setdefault(block.name, []).append(gradient[: len(window)])
            kernel = np.asarray(by_kernel[layer][part][role]["kernel"], np.float64)
            kernels[block.name] = kernels.get(block.name, 0) + kernel
    return {name: np.concatenate(parts) for name, parts in outputs.items()}, kernels, total / len(tokens)


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=tolerance * np.abs(expected).max())


def assert_measured(found, model, gradients, kernels=None, params=None):
    """Second moments are those of the gradients, pulled through the model's own kernels where that is smaller.

    Slopes are the gradients by the kernels times what changed in them.
    """
    assert list(found) == [block.name for block in model.config.blocks()]
    for block in model.config.blocks():
        entry, g = found[block.name], gradients[block.name]
        assert entry.count == len(g)
        assert_close(entry.mean_square, np.square(g).mean(0))
        if block.d_out > block.d_in:
            g = g @ np.asarray(kernel_of(model.params, block.name), np.float64)
        assert_close(entry.second_moment, g.T @ g / len(g))
        if kernels is not None:
            change = np.asarray(kernel_of(params, block.name), np.float64) - kernel_of(model.params, block.name)
            slope = np.vdot(kernels[block.name], change) / len(g)
            assert entry.slope == pytest.approx(slope, rel=1e-3, abs=1e-5 * np.abs(kernels[block.name]).max())


def other_layers(seed=1, architecture="llama"):
    return tiny_model(architecture, seed=seed).params["layers"]


# Biases and grouped queries; post-norms, norms of queries and keys, windows and a soft cap.
@pytest.mark.parametrize("architecture", ["llama_untied", "gemma3"])
def test_second_moments_are_those_of_the_gradients_by_every_output(architecture):
    model, tokens = tiny_model(architecture), random_tokens(COUNT)
    gradients, _, loss = reference(model, tokens)
    found, found_loss = measure_output_gradients(model, Calibration(tokens, window=WINDOW, batch_size=2))
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_measured(found, model, gradients)


def test_padding_adds_nothing():
    """However windows are put into batches and batches into stacks, the last of which are filled up with empty ones."""
    model, tokens = tiny_model(), random_tokens(COUNT)
    runs = [
        measure_output_gradients(
            model, Calibration(tokens, window=WINDOW, batch_size=batch_size), batches_per_call=per_call
        )
        for batch_size, per_call in ((1, 1), (2, 1), (1, 2))
    ]
    for found, loss in runs[1:]:
        assert loss == pytest.approx(runs[0][1], rel=1e-6)
        for name, entry in runs[0][0].items():
            for field in ("mean_square", "second_moment"):
                assert_close(getattr(entry, field), getattr(found[name], field))


def test_the_diagonal_alone():
    model, tokens = tiny_model(), random_tokens(COUNT)
    full, loss = measure_output_gradients(model, Calibration(tokens, window=WINDOW))
    diagonal, same = measure_output_gradients(
        model, Calibration(tokens, window=WINDOW), GradientMeasurement(geometry="diagonal")
    )
    assert same == loss
    for name, entry in diagonal.items():
        assert entry.second_moment is None
        assert entry.slope is None
        np.testing.assert_allclose(entry.mean_square, full[name].mean_square, rtol=1e-5)
        block = model.config.block(int(name.split(".")[1]), name[-1])
        if block.d_out <= block.d_in:
            np.testing.assert_allclose(np.diag(full[name].second_moment), entry.mean_square, rtol=1e-4)


@pytest.mark.parametrize("layers", [[2, 0], range(1, 2)])
def test_a_few_layers_are_measured_as_all_are(layers):
    model, tokens = tiny_model(), random_tokens(COUNT)
    everything, loss = measure_output_gradients(model, Calibration(tokens, window=WINDOW))
    some, same = measure_output_gradients(model, Calibration(tokens, window=WINDOW), GradientMeasurement(layers=layers))
    assert same == loss
    assert {name.split(".")[1] for name in some} == {str(layer) for layer in layers}
    assert len(some) == 7 * len(layers)
    for name, entry in some.items():
        assert entry.count == COUNT
        np.testing.assert_allclose(entry.mean_square, everything[name].mean_square, rtol=1e-5)
        np.testing.assert_allclose(entry.second_moment, everything[name].second_moment, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loss", ["text", "teacher"])
def test_gradients_of_another_model_are_pulled_through_the_teacher_s_kernels(loss):
    model, tokens, layers = tiny_model(), random_tokens(COUNT), other_layers()
    params = {**model.params, "layers": layers}
    gradients, kernels, value = reference(model, tokens, params, loss)
    found, found_value = measure_output_gradients(
        model,
        Calibration(tokens, window=WINDOW),
        GradientMeasurement(loss=loss, slopes=True),
        layer_params=lambda layer: layers[str(layer)],
    )
    assert found_value == pytest.approx(value, rel=1e-5)
    assert_measured(found, model, gradients, kernels, params)


def test_a_model_does_not_diverge_from_itself():
    model, tokens = tiny_model(), random_tokens(COUNT)
    found, value = measure_output_gradients(
        model, Calibration(tokens, window=WINDOW), GradientMeasurement(loss="teacher")
    )
    text, _ = measure_output_gradients(model, Calibration(tokens, window=WINDOW))
    assert value == pytest.approx(0.0, abs=1e-7)
    for name, entry in found.items():
        assert entry.mean_square.max() < 1e-9 * text[name].mean_square.max()


def test_progress_counts_batches():
    model, seen = tiny_model(), []
    measure_output_gradients(
        model,
        Calibration(random_tokens(COUNT), window=WINDOW, batch_size=2),
        batches_per_call=1,
        progress=lambda *a: seen.append(a),
    )
    assert seen == [(1, 2), (2, 2)]


def tiny_vocabulary():
    hf_config = {**HF_CONFIGS["llama_untied"], "vocab_size": 6, "num_hidden_layers": 1}
    config = DecoderConfig.from_hf(hf_config)
    params = Decoder(config).init(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]
    return LanguageModel("tiny", config, None, params, hf_config, tiny_tokenizer)


def test_sampled_gradients_average_to_the_fisher_information():
    """E[g g^T] over targets drawn from the model, which is a sum over positions of J^T (diag p - p p^T) J."""
    model, window, repeats = tiny_vocabulary(), np.array([1, 5, 0, 3], np.int32), 1500
    config = model.config

    @jax.jit
    def logits(moved):
        return model.decoder.apply({"params": model.params, "perturbations": moved}, window[None])[0][0, :-1]

    jacobians = jax.jit(jax.jacrev(logits))(no_perturbations(config, len(window)))["layers"]["0"]
    p = np.asarray(jax.nn.softmax(logits(no_perturbations(config, len(window)))), np.float64)
    covariance = [np.diag(row) - np.outer(row, row) for row in p]
    tokens = np.tile(window, repeats)
    found, loss = measure_output_gradients(
        model,
        Calibration(tokens, window=len(window), batch_size=repeats),
        GradientMeasurement(loss="sampled"),
        key=jax.random.key(1),
    )
    entropy = -(p * np.log(p)).sum() / len(window)
    assert loss == pytest.approx(entropy, rel=0.03)
    for part, role in (("attn", "v"), ("attn", "o"), ("mlp", "d"), ("mlp", "u")):
        name = f"layers.0.{part}.{role}"
        jacobian = np.asarray(jacobians[part][role]["output"], np.float64)[:, :, 0]  # target, logit, token, output
        if jacobian.shape[-1] > config.embed_dim:
            jacobian = jacobian @ np.asarray(kernel_of(model.params, name), np.float64)
        exact = np.einsum("tasi,tab,tbsj->ij", jacobian, np.stack(covariance), jacobian) / len(window)
        error = np.linalg.norm(found[name].second_moment - exact) / np.linalg.norm(exact)
        assert error < 0.1, name
        assert np.trace(found[name].second_moment) == pytest.approx(np.trace(exact), rel=0.05)


def test_sampled_tokens_are_those_of_the_key():
    model, tokens = tiny_model(), random_tokens(COUNT)

    def measured(seed):
        found, loss = measure_output_gradients(
            model,
            Calibration(tokens, window=WINDOW),
            GradientMeasurement(loss="sampled", geometry="diagonal", layers=[2]),
            key=jax.random.key(seed),
        )
        return found["layers.2.mlp.d"].mean_square, loss

    (first, loss), (again, same), (other, _) = measured(0), measured(0), measured(1)
    np.testing.assert_array_equal(first, again)
    assert loss == same
    assert np.abs(first - other).max() > 1e-3 * first.max()
    with pytest.raises(ValueError, match="need a key"):
        measure_output_gradients(model, Calibration(tokens), GradientMeasurement(loss="sampled"))


def test_inputs_of_another_model_are_not_added_up():
    model = tiny_model()
    with pytest.raises(ValueError, match="only the teacher's inputs"):
        measure_output_gradients(
            model,
            Calibration(random_tokens(5)),
            layer_params=lambda layer: model.params["layers"][str(layer)],
            inputs=InputSums(model.config),
        )


def test_too_few_tokens():
    model = tiny_model()
    for count in (0, 1):
        with pytest.raises(UsageError, match="too few tokens"):
            measure_output_gradients(model, Calibration(random_tokens(5)[:count]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value):
    model = tiny_model()
    params = jax.tree.map(lambda leaf: leaf, model.params)
    kernel = params["layers"]["1"]["mlp"]["d"]["kernel"]
    params["layers"]["1"]["mlp"]["d"]["kernel"] = kernel.at[0, 0].set(value)
    with pytest.raises(UsageError, match="not finite; load the model with --dtype float32"):
        measure_output_gradients(
            dataclasses.replace(model, params=params), Calibration(random_tokens(COUNT), window=WINDOW)
        )
