"""Families whose MLPs are mixtures of experts: Qwen 3 MoE, Mixtral, OLMoE and Granite MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.granite import GRANITE
from ngc_jax.models.families.mistral import MISTRAL
from ngc_jax.models.families.qwen import QWEN3
from ngc_jax.models.families.reading import brief, experts, number, rope
from ngc_jax.models.families.record import (
    EXPERTS,
    PRE_NORMS,
    PROJECTIONS,
    QK_NORMS,
    STACKED_EXPERTS,
    Family,
    attention_bias,
)

_ATTENTION = {name: module for name, module in PROJECTIONS.items() if name.startswith("attn.")}


def _qwen3_sparse(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, except those of `mlp_only_layers`."""
    layers, dense = range(hf["num_hidden_layers"]), hf.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
        raise UsageError(f"mlp_only_layers in config.json is {brief(dense)}; expected a list of layers")
    step = number(hf, "decoder_sparse_step", int, 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    features=lambda hf: {
        **QWEN3.features({**hf, "layer_types": None, "max_window_layers": 0}),
        "experts": experts(hf, 128, "moe_intermediate_size", bool(hf.get("norm_topk_prob")), _qwen3_sparse(hf)),
    },
    defaults={
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    biases=attention_bias,
    modules=PROJECTIONS | PRE_NORMS | QK_NORMS | EXPERTS,
    stacked=STACKED_EXPERTS,
    expert_width="moe_intermediate_size",
    differs="mixtures of experts, in every layer or some; otherwise as Qwen 3",
)


def _mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **MISTRAL.features(hf),
        "ropes": (rope(hf, theta=1e6),) * hf["num_hidden_layers"],
        "experts": experts(hf, 8, "intermediate_size", True),
    }


_MIXTRAL_EXPERTS = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.g.*": "block_sparse_moe.experts.*.w1",
    "mlp.d.*": "block_sparse_moe.experts.*.w2",
    "mlp.u.*": "block_sparse_moe.experts.*.w3",
}
MIXTRAL = Family(
    "mixtral",
    "MixtralConfig",
    "MixtralForCausalLM",
    features=_mixtral,
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
    },
    modules=_ATTENTION | PRE_NORMS | _MIXTRAL_EXPERTS,
    differs="mixtures of experts in every layer; a sliding window in every layer where config.json has one",
)


def _olmoe(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("clip_qkv") is not None:
        raise UsageError(f"clip_qkv in config.json is {brief(hf['clip_qkv'])}, which is not supported; expected null")
    normalised = bool(hf.get("norm_topk_prob", False))
    return {"qk_norm": "whole", "experts": experts(hf, 64, "intermediate_size", normalised)}


OLMOE = Family(
    "olmoe",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    features=_olmoe,
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
    },
    biases=attention_bias,
    modules=_ATTENTION | PRE_NORMS | QK_NORMS | EXPERTS,
    stacked=STACKED_EXPERTS,
    differs="mixtures of experts in every layer; norms of whole queries and keys",
)
GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeConfig",
    "GraniteMoeForCausalLM",
    features=lambda hf: {
        **GRANITE.features(hf),
        "experts": experts(hf, 8, "intermediate_size", True),
    },
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 2,
    },
    biases=attention_bias,
    modules=_ATTENTION | PRE_NORMS | _MIXTRAL_EXPERTS | {"mlp.router": "block_sparse_moe.router.layer"},
    stacked={
        "block_sparse_moe.input_linear.weight": ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
        "block_sparse_moe.output_linear.weight": ("block_sparse_moe.experts.*.w2",),
    },
    writes_stacked=True,
    differs="mixtures of experts in every layer; Granite's multipliers",
)
