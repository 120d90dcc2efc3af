"""Qwen 2 and Qwen 3."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.llama import GGUF_ATTENTION, GGUF_QKV, llama_class, llama_gguf, qkv_biased
from ngc_jax.models.families.reading import layer_types, windows
from ngc_jax.models.families.record import (
    PRE_NORMS,
    PROJECTIONS,
    QK_NORMS,
    Family,
    Gguf,
    GgufKeys,
    attention_bias,
)

_DEFAULTS = {"max_position_embeddings": 32_768, "sliding_window": 4096}


def _windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = hf["num_hidden_layers"]
    if hf.get("sliding_window") is None or not hf.get("use_sliding_window"):
        return (None,) * layers
    sliding = layer_types(hf, layers)
    if sliding is None:
        first = hf.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise UsageError(f"max_window_layers in config.json is {first!r}; expected a whole number")
        sliding = tuple(layer >= first for layer in range(layers))
    return windows(hf, sliding)


def _gguf2(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return qkv_biased() if biased <= GGUF_QKV else llama_class() | llama_gguf(keys, config, biased)


def _gguf3(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": bool(biased & GGUF_ATTENTION)}


QWEN2 = Family(
    "qwen2",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    features=lambda hf: {"windows": _windows(hf)},
    defaults=_DEFAULTS,
    biases=lambda hf: (True, False, False),
    gguf=Gguf("qwen2", _gguf2, wide_heads="llama"),
    differs="biases on q, k and v; sliding windows in the upper layers where enabled",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    features=lambda hf: {"windows": _windows(hf), "qk_norm": "head"},
    defaults={**_DEFAULTS, "head_dim": 128},
    biases=attention_bias,
    modules=PROJECTIONS | PRE_NORMS | QK_NORMS,
    gguf=Gguf("qwen3", _gguf3),
    differs="norms of query and key heads; sliding windows where enabled",
)
