"""OLMo 2 and 3: norms after attention and MLP instead of before, and norms of whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.models.families.reading import FULL, SLIDING, all_but_every, layer_types, rope, windows
from ngc_jax.models.families.record import (
    POST_NORMS,
    PROJECTIONS,
    QK_NORMS,
    Family,
    Gguf,
    GgufKeys,
    attention_bias,
    only_in_hf,
)

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

_NORMS = {"pre_norms": False, "post_norms": True, "qk_norm": "whole"}


def _olmo3(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers, theta = hf["num_hidden_layers"], 500_000.0
    found = windows(hf, layer_types(hf, layers) or all_but_every(4, layers))
    full, local = rope(hf, FULL, theta), rope(hf, SLIDING, theta)
    return {**_NORMS, "windows": found, "ropes": tuple(full if window is None else local for window in found)}


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    if keys.get("attention.sliding_window") is not None:
        raise keys.error("attention.sliding_window", "is set, which is not supported")
    return {"hidden_act": "silu", "attention_bias": bool(biased)}


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    only_in_hf(config, biases=config.qkv_bias)
    return {}


OLMO2 = Family(
    "olmo2",
    "Olmo2Config",
    "Olmo2ForCausalLM",
    features=lambda hf: _NORMS,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    biases=attention_bias,
    modules=PROJECTIONS | POST_NORMS | QK_NORMS,
    gguf=Gguf("olmo2", _settings, _metadata),
    differs="norms after attention and MLP only; norms of whole queries and keys",
)
OLMO3 = Family(
    "olmo3",
    "Olmo3Config",
    "Olmo3ForCausalLM",
    features=_olmo3,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096},
    biases=attention_bias,
    modules=PROJECTIONS | POST_NORMS | QK_NORMS,
    differs="as OLMo 2, with sliding windows in three of four layers, whose rope is not scaled",
)
