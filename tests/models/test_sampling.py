"""Sampling against a float64 computation that sorts, and against its own frequencies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.models.sampling import Sampling, sample, scores

VOCAB = 23
jit_scores = jax.jit(scores)
jit_sample = jax.jit(sample)


def logits_of(seed: int, rows: int = 2) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)


def expected_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(V,) in float64: sort, cut after k, normalise, cut once the sum is there, normalise."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)[: sampling.top_k or logits.size]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    if sampling.top_p is not None:
        kept = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    probabilities = np.zeros(logits.size)
    probabilities[order] = p
    return probabilities


@given(
    st.integers(0, 10_000),
    st.floats(0.05, 20.0),
    st.none() | st.integers(1, VOCAB + 5),
    st.none() | st.floats(0.01, 0.99),
)
def test_probabilities(seed: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    logits = logits_of(seed)
    actual = np.asarray(jax.nn.softmax(jit_scores(logits, sampling.arrays), axis=-1), np.float64)
    for row, probabilities in zip(logits, actual, strict=True):
        expected = expected_probabilities(row, sampling)
        # On the very edge of top_p, rounding decides whether one more token is let in.
        edge = Sampling(temperature, top_k, None if top_p is None else min(top_p * (1 + 1e-5), 1.0))
        wider = expected_probabilities(row, edge)
        assert np.allclose(probabilities, expected, atol=1e-5) or np.allclose(probabilities, wider, atol=1e-5)
        assert set(np.flatnonzero(probabilities)) <= set(np.flatnonzero(wider))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.0), Sampling(1.3, top_k=4), Sampling(2.5, top_p=0.8), Sampling(1.0, 9, 0.7)],
    ids=str,
)
def test_frequencies(sampling: Sampling) -> None:
    """The tokens drawn are distributed as they should be, and none is drawn that may not be."""
    logits, draws = logits_of(3, rows=1), 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = np.asarray(jit_sample(keys, jnp.broadcast_to(logits, (draws, VOCAB)), sampling.arrays))
    frequencies = np.bincount(tokens, minlength=VOCAB) / draws
    expected = expected_probabilities(logits[0], sampling)
    assert tokens.dtype == np.int32
    assert np.all(frequencies[expected == 0] == 0)
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12)


def test_greedy_is_the_first_of_the_greatest() -> None:
    logits = logits_of(0, rows=4)
    logits[1, [7, 4, 9]] = 50.0
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = jit_sample(keys, logits, Sampling(0.0, top_k=3, top_p=0.5).arrays)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert tokens[1] == 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.1), Sampling(1.1, top_k=6, top_p=0.9)], ids=str)
def test_a_row_does_not_depend_on_the_others(sampling: Sampling) -> None:
    logits, keys = logits_of(5, rows=6), jax.random.split(jax.random.key(2), 6)
    together = jit_sample(keys, logits, sampling.arrays)
    for row in range(6):
        alone = jit_sample(keys[row : row + 1], logits[row : row + 1], sampling.arrays)
        assert alone[0] == together[row]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 1e-4])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_tiny_temperatures_take_the_greatest(temperature: float, top_p: float | None) -> None:
    logits = logits_of(6, rows=3)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = Sampling(temperature, top_p=top_p).arrays
    np.testing.assert_array_equal(jit_sample(keys, logits, arrays), logits.argmax(axis=1))
    # Not by way of the greedy branch: among equals, chance decides.
    assert arrays.temperature > 0


def test_equals_at_the_edge_are_all_let_in() -> None:
    logits = jnp.array([[5.0, 1.0, 3.0, 3.0, 3.0, 0.0]])
    allowed = jnp.isfinite(scores(logits, Sampling(1.0, top_k=2).arrays))
    np.testing.assert_array_equal(allowed, [[True, False, True, True, True, False]])


def test_all_tokens_means_all_of_them() -> None:
    """However unlikely: their share is lost when the others' are added up in float32."""
    logits = jnp.array([[0.0, -30.0, -60.0, -80.0]])
    assert jnp.all(jnp.isfinite(scores(logits, Sampling(1.0, top_k=4).arrays)))
    assert jnp.all(jnp.isfinite(scores(logits, Sampling(1.0, top_p=1.0).arrays)))
    assert jnp.isfinite(scores(logits, Sampling(1.0, top_p=0.999999).arrays)).sum() == 1


def test_impossible_tokens_stay_impossible() -> None:
    logits = jnp.full((1, VOCAB), -jnp.inf).at[0, 3].set(1.0).at[0, 8].set(-1.0)
    keys = jax.random.split(jax.random.key(0), 200)
    for sampling in (Sampling(3.0), Sampling(3.0, top_k=5), Sampling(3.0, top_p=0.99)):
        tokens = jit_sample(keys, jnp.broadcast_to(logits, (200, VOCAB)), sampling.arrays)
        assert set(np.unique(tokens)) == {3, 8}


def test_another_sampling_compiles_nothing() -> None:
    fresh = jax.jit(lambda *arguments: sample(*arguments))
    keys = jax.random.split(jax.random.key(0), 2)
    for sampling in (Sampling(), Sampling(0.5), Sampling(0.5, top_k=2), Sampling(2.0, 3, 0.5)):
        fresh(keys, logits_of(0), sampling.arrays)
    assert fresh._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p is 1.01"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p is nan"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Sampling(**settings)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
