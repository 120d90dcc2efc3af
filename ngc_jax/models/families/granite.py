"""Granite: multipliers of embeddings, residuals, attention and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.reading import number
from ngc_jax.models.families.record import Family, all_biases


def _granite(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embed_scale": number(hf, "embedding_multiplier", float, 1.0),
        "residual_scale": number(hf, "residual_multiplier", float, 1.0),
        "attention_scale": number(hf, "attention_multiplier", float, 1.0),
        "logit_scale": 1 / number(hf, "logits_scaling", float, 1.0),
    }


GRANITE = Family(
    "granite",
    "GraniteConfig",
    "GraniteForCausalLM",
    features=_granite,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    biases=all_biases,
    differs="multipliers of embeddings, residuals, attention and logits",
)
