"""The config.json that a GGUF file's settings mean, against transformers and the formula of Llama 3's factors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.models.gguf.config import rope_scaling_from_factors
from ngc_jax.models.gguf.source import GgufSource
from tests.models.gguf.files import (
    LAYERS,
    D,
    F,
    H,
    K,
    N,
    V,
    gguf_tensors,
    hf_tensors,
    make,
    metadata,
    refused,
    write,
)


@pytest.mark.parametrize(
    ("arch", "config_class"),
    [("llama", "LlamaConfig"), ("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config"), ("gemma3", "Gemma3TextConfig")],
)
def test_transformers_understands_the_config(tmp_path: Path, arch: str, config_class: str) -> None:
    from ngc_jax.models.tokenizer_model import quiet_transformers

    with quiet_transformers():
        import transformers
    changes = {} if arch == "gemma3" else {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    with GgufSource(make(tmp_path / "m.gguf", arch, **changes)) as source:
        config = getattr(transformers, config_class)(**source.config)
    assert config.model_type == source.config["model_type"]
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (V, D, F, LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (N, K, H)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (128, 1e-5)
    assert config.tie_word_embeddings
    if arch == "gemma3":
        rope = config.rope_parameters
        assert rope["full_attention"]["rope_theta"] == 50_000.0
        assert rope["sliding_attention"]["rope_theta"] == 10_000.0
        assert config.hidden_activation == "gelu_pytorch_tanh"
        assert (config.sliding_window, config.query_pre_attn_scalar) == (512, H)
    else:
        rope = config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 8.0, 50_000.0)
        assert config.hidden_act == "silu"


def tiny_gemma(path: Path, layers: int, **changes: Any) -> dict[str, Any]:
    tensors = {f"blk.{layers - 1}.attn_q.weight": np.ones((N * H, D), np.float32)}
    tensors["token_embd.weight"] = np.ones((V, D), np.float32)
    keys = metadata("gemma3", block_count=layers, **changes)
    with GgufSource(write(path, "gemma3", tensors, keys)) as source:
        return source.config


def test_gemma3_layers_and_query_scale(tmp_path: Path) -> None:
    config = tiny_gemma(tmp_path / "4b.gguf", 26)
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17, 23]
    assert config["query_pre_attn_scalar"] == H
    # The largest size alone scales by hidden size per head.
    assert tiny_gemma(tmp_path / "27b.gguf", 62)["query_pre_attn_scalar"] == D // N
    listed = tiny_gemma(tmp_path / "l.gguf", 3, **{"attention.sliding_window_pattern": [True, False, True]})
    assert listed["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    period = tiny_gemma(tmp_path / "p.gguf", 4, **{"attention.sliding_window_pattern": 2})
    assert period["layer_types"] == ["sliding_attention", "full_attention"] * 2
    with refused("sliding_window_pattern", "3"):
        tiny_gemma(tmp_path / "b.gguf", 3, **{"attention.sliding_window_pattern": [True, False]})


def test_missing_settings_have_ggufs_defaults(tmp_path: Path) -> None:
    keys = metadata("llama", **{"attention.head_count": 2})
    for key in ("attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.freq_base"):
        del keys[f"llama.{key}"]
    del keys["llama.rope.dimension_count"]
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, keys)) as source:
        config = source.config
    assert (config["head_dim"], config["num_key_value_heads"], config["rope_theta"]) == (D // 2, 2, 10_000.0)
    assert config["rope_scaling"] is None


def test_yarn(tmp_path: Path) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    with GgufSource(make(tmp_path / "m.gguf", "qwen2", **keys)) as source:
        expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        assert source.config["rope_scaling"] == expected
    with GgufSource(make(tmp_path / "b.gguf", "qwen2", **keys, **{"rope.scaling.yarn_beta_fast": 16.0})) as source:
        assert source.config["rope_scaling"]["beta_fast"] == 16.0
    with refused("attn_factor"):
        GgufSource(make(tmp_path / "c.gguf", "qwen2", **keys, **{"rope.scaling.attn_factor": 2.0}))


def llama3_factors(theta: float, head: int, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """The rule as published, one dimension at a time."""
    factors = []
    for pair in range(head // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("theta", "head", "factor", "high", "length"),
    [(5e5, 128, 8.0, 4.0, 8192), (5e5, 64, 32.0, 4.0, 8192), (1e4, 96, 16.0, 3.0, 2048)],
)
def test_llama3_scaling_is_recovered(theta: float, head: int, factor: float, high: float, length: int) -> None:
    factors = llama3_factors(theta, head, factor, 1.0, high, length)
    assert rope_scaling_from_factors(factors, theta) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


@given(
    theta=st.floats(1e3, 1e7),
    head=st.sampled_from([32, 64, 80, 128]),
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 3),
    ratio=st.floats(1.2, 8),
    length=st.integers(256, 100_000),
)
def test_recovered_scaling_means_the_same_factors(
    theta: float, head: int, factor: float, low: float, ratio: float, length: int
) -> None:
    factors = llama3_factors(theta, head, factor, low, low * ratio, length)
    scaling = rope_scaling_from_factors(factors, theta)
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        again = llama3_factors(theta, head, scaling["factor"], low, high, scaling["original_max_position_embeddings"])
        np.testing.assert_allclose(again, factors, rtol=2e-4)
    else:
        np.testing.assert_array_equal(np.float32(scaling["factors"]), factors)


@pytest.mark.parametrize(
    "factors", [np.ones(16), np.linspace(1, 9, 16), np.r_[np.ones(8), np.full(8, 4.0)], np.linspace(3, 0, 16)]
)
def test_other_factors_are_given_as_they_are(factors: np.ndarray) -> None:
    scaling = rope_scaling_from_factors(factors.astype(np.float32), 1e4)
    assert scaling["rope_type"] == "explicit"
    np.testing.assert_array_equal(np.float32(scaling["factors"]), factors.astype(np.float32))


def test_factors_in_a_file_become_the_config(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["rope_freqs.weight"] = llama3_factors(50_000.0, H, 8.0, 1.0, 4.0, 4096)
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama"))) as source:
        assert source.config["rope_scaling"]["original_max_position_embeddings"] == 4096
        assert not [name for name in source.shapes if "rope" in name]
    tensors["rope_freqs.weight"] = np.ones(5, np.float32)
    with refused("5 factors", "12"):
        GgufSource(write(tmp_path / "bad.gguf", "llama", tensors, metadata("llama")))
