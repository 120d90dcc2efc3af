"""Rotary embeddings, against closed forms; tests/parity compares with transformers' numbers."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.models.attention import rotate
from ngc_jax.models.rope import Rope, rope_from_hf

HEAD_DIM = 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def read(parameters: dict[str, Any], theta: float = 10_000.0, max_length: int = 4096) -> Rope:
    return rope_from_hf(parameters, theta, max_length)


def wavelengths(rope: Rope, head_dim: int = HEAD_DIM) -> np.ndarray:
    return 2 * np.pi / rope.inverse_frequencies(head_dim)


def test_default_is_a_geometric_series() -> None:
    frequencies = Rope(100.0).inverse_frequencies(8)
    np.testing.assert_allclose(frequencies, [1, 100**-0.25, 100**-0.5, 100**-0.75], rtol=1e-14)
    assert frequencies.dtype == np.float64


def test_linear_divides_every_frequency() -> None:
    rope = read({"type": "linear", "factor": 2.5})
    np.testing.assert_allclose(wavelengths(rope), 2.5 * wavelengths(Rope(10_000.0)), rtol=1e-14)


def test_llama3_scales_long_waves_only() -> None:
    rope = read(LLAMA3, theta=500_000.0)
    plain = wavelengths(Rope(500_000.0), 128)
    stretched = wavelengths(rope, 128) / plain
    np.testing.assert_allclose(stretched[plain < 8192 / 4], 1, rtol=1e-14)
    np.testing.assert_allclose(stretched[plain > 8192 / 1], 8, rtol=1e-14)
    between = (plain >= 8192 / 4) & (plain <= 8192)
    assert between.sum() > 3
    # In between, the share of the unscaled frequency is linear in the rotations over the original length.
    share = (8192 / plain[between] - 1) / (4 - 1)
    np.testing.assert_allclose(1 / stretched[between], share + (1 - share) / 8, rtol=1e-12)


def test_yarn_ramps_over_dimensions() -> None:
    rope = read(YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": False})
    plain = wavelengths(Rope(10_000.0), 128)
    kept = 1 / (wavelengths(rope, 128) / plain)  # 1 where nothing is interpolated, 1/4 where all is
    np.testing.assert_allclose(kept[4096 / plain > 32], 1, rtol=1e-14)
    np.testing.assert_allclose(kept[4096 / plain < 1], 1 / 4, rtol=1e-14)
    ramp = kept[(4096 / plain <= 32) & (4096 / plain >= 1)]
    np.testing.assert_allclose(np.diff(ramp, 2), 0, atol=1e-12)  # a straight line
    assert len(ramp) > 10
    assert np.all(np.diff(ramp) < 0)


def test_yarn_rounds_the_ends_of_its_ramp_outwards() -> None:
    rounded, exact = (read(YARN | {"truncate": truncate}).inverse_frequencies(128) for truncate in (True, False))
    plain = Rope(10_000.0).inverse_frequencies(128)
    assert set(np.flatnonzero(rounded != exact)) <= set(np.flatnonzero((exact < plain) | (rounded < plain)))
    assert np.abs(rounded / exact - 1).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_attention_factor(settings: dict[str, Any], expected: float) -> None:
    assert read(YARN | settings).attention_factor == pytest.approx(expected)


def test_where_theta_and_the_original_length_come_from() -> None:
    assert read({"rope_theta": 5.0}, theta=7.0).theta == 5.0
    assert read({}, theta=7.0).theta == 7.0
    assert read({"rope_type": "yarn", "factor": 2.0}, max_length=777).original_length == 777
    assert read(YARN, max_length=777).original_length == 4096


def test_explicit_factors() -> None:
    plain = Rope(10_000.0).inverse_frequencies(8)
    rope = read({"rope_type": "explicit", "factors": [1, 2, 4, 8]})
    np.testing.assert_allclose(rope.inverse_frequencies(8), plain / [1, 2, 4, 8], rtol=1e-14)
    with pytest.raises(UsageError, match="rope has 4 explicit factors; expected 5, one for two dimensions"):
        rope.inverse_frequencies(10)


@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    theta=st.floats(10, 1e7),
    factor=st.floats(1, 100),
    length=st.integers(16, 100_000),
    pairs=st.integers(1, 80),
)
def test_scaling_lengthens_waves_by_at_most_the_factor(
    kind: str, theta: float, factor: float, length: int, pairs: int
) -> None:
    parameters = (LLAMA3 if kind == "llama3" else YARN) | {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": length,
    }
    ratio = wavelengths(read(parameters, theta), 2 * pairs) / wavelengths(Rope(theta), 2 * pairs)
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= factor * (1 + 1e-9)
    assert np.all(np.diff(ratio) >= -1e-9 * factor)  # longer waves are stretched more


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' is not supported; expected one of default, "),
        ({"type": "linear"}, "rope type 'linear' lacks factor; add to rope_parameters in config.json"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope type 'llama3' lacks low_freq_factor, high_freq_factor, orig"),
        (YARN | {"factor": 0}, "factor of the rope in config.json is 0; expected a positive number"),
        (YARN | {"factor": "4"}, "factor of the rope in config.json is '4'; expected a positive number"),
        (YARN | {"beta_fast": True}, "beta_fast of the rope in config.json is True; expected a positive number"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "rope has low_freq_factor 1.0 and high_freq_factor 1.0; expected the "),
        ({"partial_rotary_factor": 0.5}, "partial rotary embeddings are not supported; expected "),
        (["linear"], "rope_parameters in config.json is ['linear']; expected names and numbers"),
    ],
)
def test_errors(parameters: Any, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(parameters)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rope", [Rope(50.0), read(LLAMA3), read(YARN | {"attention_factor": 1.3})])
def test_rotation(rope: Rope) -> None:
    """The definition: pair (i, i + H/2) turns by position times frequency, in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, HEAD_DIM))
    positions = rng.integers(0, 100, (2, 5))
    turn = np.exp(1j * positions[..., None, None] * rope.inverse_frequencies(HEAD_DIM)) * rope.attention_factor
    pairs = (x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]) * turn
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    rotated = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rope)
    np.testing.assert_allclose(rotated, expected, atol=3e-5)


def test_attention_logits_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, HEAD_DIM)), jnp.float32) for _ in range(2))

    def logit(q_position: int, k_position: int) -> float:
        rotated = (rotate(x, jnp.full((1, 1), at), Rope(50.0)) for x, at in ((q, q_position), (k, k_position)))
        return float(jnp.vdot(*rotated))

    assert logit(17, 5) == pytest.approx(logit(112, 100), rel=1e-3)
    assert abs(logit(17, 5) - logit(18, 5)) > 0.1


def test_rotation_keeps_the_type() -> None:
    x = jnp.ones((1, 2, 3, HEAD_DIM), jnp.bfloat16)
    assert rotate(x, jnp.zeros((1, 2), jnp.int32), Rope(50.0)).dtype == jnp.bfloat16
