import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ngc_jax.evaluation.likelihood import (
    divergence_gradient,
    hidden_divergences,
    hidden_log_likelihoods,
    log_likelihood_gradient,
    sample_targets,
)
from tests.tiny import tiny_model

BATCH, LENGTH = 2, 11


def setting(architecture="gemma3"):
    """A decoder, its parameters, hidden states of a student and a teacher, tokens, and positions with padding."""
    model, rng = tiny_model(architecture), np.random.default_rng(0)
    ours, theirs = jnp.asarray(2 * rng.standard_normal((2, BATCH, LENGTH, model.config.embed_dim)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 256, (BATCH, LENGTH)), jnp.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    positions[1, 7:] = -1
    return model.decoder, model.params, ours, theirs, tokens, jnp.asarray(positions)


def log_probabilities(decoder, params, hidden):
    logits = np.asarray(decoder.apply({"params": params}, hidden, method="logits"), np.float64)
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("architecture", ["gemma3", "llama_untied"])
def test_divergences_are_those_of_the_definition(architecture):
    decoder, params, ours, theirs, _, positions = setting(architecture)
    student, teacher = (log_probabilities(decoder, params, hidden) for hidden in (ours, theirs))
    expected = (np.exp(teacher) * (teacher - student)).sum(-1) * (np.asarray(positions) >= 0)
    found, mask = hidden_divergences(decoder, params, ours, theirs, positions)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mask, np.asarray(positions) >= 0)
    same, _ = hidden_divergences(decoder, params, theirs, theirs, positions)
    np.testing.assert_array_equal(same, 0)


@pytest.mark.parametrize("chunk", [1, 4, 11, 500])
def test_scores_and_gradients_do_not_depend_on_the_chunk(chunk):
    decoder, params, ours, theirs, tokens, positions = setting()

    def total(hidden, size):
        divergences, _ = hidden_divergences(decoder, params, hidden, theirs, positions, chunk=size)
        likelihoods, _ = hidden_log_likelihoods(decoder, params, hidden, tokens, positions, chunk=size)
        return divergences.sum() - likelihoods.sum(), (divergences, likelihoods)

    evaluate = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, scores), gradient = evaluate(ours, chunk)
    (_, expected), expected_gradient = evaluate(ours, 256)
    for found, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    # Padding, and what is in it, has no part in anything.
    np.testing.assert_array_equal(gradient[1, 7:], 0)
    moved, _ = evaluate(ours.at[1, 7:].add(3.0), chunk)
    np.testing.assert_allclose(moved[0], evaluate(ours, chunk)[0][0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 500])
def test_gradients_from_one_pass_are_those_of_automatic_differentiation(chunk):
    decoder, params, ours, theirs, tokens, positions = setting()

    def divergence(hidden):
        return hidden_divergences(decoder, params, hidden, theirs, positions)[0].sum()

    def likelihood(hidden):
        return hidden_log_likelihoods(decoder, params, hidden, tokens, positions)[0].sum()

    for found, total in (
        (divergence_gradient(decoder, params, ours, theirs, positions, chunk=chunk), divergence),
        (log_likelihood_gradient(decoder, params, ours, tokens, positions, chunk=chunk), likelihood),
    ):
        value, gradient = jax.jit(jax.value_and_grad(total))(ours)
        np.testing.assert_allclose(found[0], value, rtol=1e-5)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-4, atol=1e-6)


def test_sampled_targets_depend_on_the_key_alone():
    decoder, params, hidden, _, tokens, _ = setting()
    key = jax.random.key(4)
    drawn = sample_targets(decoder, params, hidden, tokens, key)
    assert drawn.shape == tokens.shape
    assert drawn.dtype == tokens.dtype
    np.testing.assert_array_equal(drawn[:, 0], tokens[:, 0])
    for chunk in (1, 3, 500):
        np.testing.assert_array_equal(drawn, sample_targets(decoder, params, hidden, tokens, key, chunk=chunk))
    assert (np.asarray(drawn) != sample_targets(decoder, params, hidden, tokens, jax.random.key(5))).any()


def test_sampled_targets_follow_the_prediction_before_them():
    decoder, params, hidden, _, _, _ = setting()
    count = 4000
    rows = jnp.broadcast_to(hidden[0, :3], (count, 3, hidden.shape[-1]))
    drawn = np.asarray(sample_targets(decoder, params, rows, jnp.zeros((count, 3), jnp.int32), jax.random.key(0)))
    probabilities = np.exp(log_probabilities(decoder, params, hidden[0, :3]))
    for place in (1, 2):
        frequencies = np.bincount(drawn[:, place], minlength=probabilities.shape[1]) / count
        expected = probabilities[place - 1]
        likely = expected * count > 10
        error = np.abs(frequencies - expected)[likely] / np.sqrt(expected[likely] / count)
        assert error.max() < 5
    # Tokens of one row are drawn apart from each other, and rows too.
    assert len(np.unique(drawn[:, 1] * 1000 + drawn[:, 2])) > len(np.unique(drawn[:, 1]))
