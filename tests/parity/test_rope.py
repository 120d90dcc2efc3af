"""Inverse frequencies of every rotary scaling, against transformers'."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from typing import Any  # noqa: E402

import transformers  # noqa: E402
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from ngc_jax.models.config import DecoderConfig  # noqa: E402

SIZES = {
    "vocab_size": 7,
    "hidden_size": 24,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}
# As published: Llama 3.1 and 3.2, Qwen 2.5 and 3 with YaRN, long Llama 2, a YaRN of Llama 2, DeepSeek's scales.
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
PUBLISHED: list[tuple[int, int, dict[str, Any]]] = [
    (128, 131_072, LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}),
    (64, 131_072, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
    (128, 32_768, YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32_768}),
    (128, 40_960, YARN | {"rope_theta": 1e6, "beta_fast": 16, "beta_slow": 2}),
    (128, 4096, {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}),
    (128, 65_536, YARN | {"factor": 16.0, "original_max_position_embeddings": 4096, "attention_factor": 1.2}),
    (64, 163_840, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1}),
    (64, 16_384, YARN | {"truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150_000.0}),
    (96, 2048, {"rope_type": "default", "rope_theta": 77_777.0}),
]


def check(head_dim: int, max_length: int, parameters: dict[str, Any]) -> None:
    """Compare frequencies and the factor of cosine and sine."""
    settings = SIZES | {"head_dim": head_dim, "max_position_embeddings": max_length}
    config = transformers.LlamaConfig(**settings, rope_parameters=dict(parameters))
    if parameters["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    raw = settings | {"model_type": "llama", "rope_parameters": parameters}
    (rope,) = DecoderConfig.from_hf(raw).ropes
    # Theirs are float32, and blend numbers up to 64 times apart.
    np.testing.assert_allclose(rope.inverse_frequencies(head_dim), expected.numpy(), rtol=1e-4)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("head_dim", "max_length", "parameters"), PUBLISHED)
def test_published_settings(head_dim: int, max_length: int, parameters: dict[str, Any]) -> None:
    check(head_dim, max_length, parameters)


thetas = st.floats(100, 1e7)
factors = st.floats(1, 64)
lengths = st.integers(64, 65_536)
pairs = st.integers(4, 80)


@settings(max_examples=30)
@given(head=pairs, theta=thetas, factor=factors, length=lengths, low=st.floats(0.5, 4), ratio=st.floats(1.5, 16))
def test_llama3(head: int, theta: float, factor: float, length: int, low: float, ratio: float) -> None:
    check(
        2 * head,
        2 * length,
        {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": low * ratio,
            "original_max_position_embeddings": length,
        },
    )


@settings(max_examples=30)
@given(
    head=pairs,
    theta=thetas,
    factor=factors,
    length=lengths,
    slow=st.floats(0.1, 4),
    ratio=st.floats(2, 64),
    truncate=st.booleans(),
)
def test_yarn(head: int, theta: float, factor: float, length: int, slow: float, ratio: float, truncate: bool) -> None:
    # Beyond these, even the slowest pair turns faster than beta_fast or the fastest slower than beta_slow: there is
    # no ramp, and transformers' formula divides by a negative number.
    fast = slow * ratio
    assume(length / (2 * np.pi) > 2 * slow and length / (2 * np.pi) / theta < fast / 2)
    check(
        2 * head,
        length,
        {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": truncate,
            "original_max_position_embeddings": length,
        },
    )
