"""GLM 4: half of every head is rotated, by pairs of neighbours; GLM 4 0414 has norms after attention and MLP too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from ngc_jax.models.families.phi import FUSED_MLP
from ngc_jax.models.families.reading import rope
from ngc_jax.models.families.record import PRE_NORMS, PROJECTIONS, Family, Gguf, GgufKeys

_DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}


def _ropes(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"ropes": (dataclasses.replace(rope(hf, share=0.5), interleaved=True),) * hf["num_hidden_layers"]}


def _biases(hf: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    return bool(hf.get("attention_bias")), False, False


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": bool(biased)}


GLM = Family(
    "glm",
    "GlmConfig",
    "GlmForCausalLM",
    features=_ropes,
    defaults=_DEFAULTS,
    biases=_biases,
    fused=FUSED_MLP,
    differs="fused gate and up; half-rotated heads of neighbouring pairs; biases on q, k and v",
)
GLM4 = Family(
    "glm4",
    "Glm4Config",
    "Glm4ForCausalLM",
    features=lambda hf: _ropes(hf) | {"post_norms": True},
    defaults=_DEFAULTS,
    biases=_biases,
    modules=PROJECTIONS
    | PRE_NORMS
    | {"attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
    fused=FUSED_MLP,
    gguf=Gguf("glm4", _settings, partial_rotary=True),
    differs="as GLM, with norms after attention and MLP",
)
