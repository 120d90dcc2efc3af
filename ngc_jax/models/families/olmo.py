"""OLMo 2 and 3: norms after attention and MLP instead of before, and norms of whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.reading import FULL, SLIDING, all_but_every, layer_types, rope, windows
from ngc_jax.models.families.record import POST_NORMS, PROJECTIONS, QK_NORMS, Family, attention_bias

_NORMS = {"pre_norms": False, "post_norms": True, "qk_norm": "whole"}


def _olmo3(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers, theta = hf["num_hidden_layers"], 500_000.0
    found = windows(hf, layer_types(hf, layers) or all_but_every(4, layers))
    full, local = rope(hf, FULL, theta), rope(hf, SLIDING, theta)
    return {**_NORMS, "windows": found, "ropes": tuple(full if window is None else local for window in found)}


OLMO2 = Family(
    "olmo2",
    "Olmo2Config",
    "Olmo2ForCausalLM",
    features=lambda hf: _NORMS,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    biases=attention_bias,
    modules=PROJECTIONS | POST_NORMS | QK_NORMS,
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
