"""Granite: multipliers of embeddings, residuals, attention and logits."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.models.families.llama import GGUF_ATTENTION
from ngc_jax.models.families.reading import number
from ngc_jax.models.families.record import Family, Gguf, GgufKeys, all_biases

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig


def _granite(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embed_scale": number(hf, "embedding_multiplier", float, 1.0),
        "residual_scale": number(hf, "residual_multiplier", float, 1.0),
        "attention_scale": number(hf, "attention_multiplier", float, 1.0),
        "logit_scale": 1 / number(hf, "logits_scaling", float, 1.0),
    }


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "attention_bias": bool(biased & GGUF_ATTENTION),
        "mlp_bias": bool(biased - GGUF_ATTENTION),
        "embedding_multiplier": keys.real("embedding_scale", 1.0),
        "residual_multiplier": keys.real("residual_scale", 1.0),
        "attention_multiplier": keys.real("attention.scale", config["head_dim"] ** -0.5),
        "logits_scaling": keys.real("logit_scale", 1.0),
    }


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    return {
        "embedding_scale": config.embed_scale,
        "residual_scale": config.residual_scale,
        "attention.scale": config.attention_scale,
        "logit_scale": 1 / config.logit_scale,
    }


GRANITE = Family(
    "granite",
    "GraniteConfig",
    "GraniteForCausalLM",
    features=_granite,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    biases=all_biases,
    gguf=Gguf("granite", _settings, _metadata, paired_rotary=True),
    differs="multipliers of embeddings, residuals, attention and logits",
)
