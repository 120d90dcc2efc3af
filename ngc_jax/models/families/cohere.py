"""Command R and Command A: attention and MLP side by side, layer norms, rotation by pairs of neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import all_but_every, layer_types, number, rope, windows
from ngc_jax.models.families.record import PROJECTIONS, Family, attention_bias

_DEFAULTS = {
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}


def _block(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"norm": "layer", "parallel": True, "logit_scale": number(hf, "logit_scale", float)}


def _cohere(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("use_qk_norm"):
        raise UsageError("cohere models with use_qk_norm, whose heads have norms of their own, are not supported")
    own = dataclasses.replace(rope(hf, theta=500_000.0), interleaved=True)
    return _block(hf) | {"ropes": (own,) * hf["num_hidden_layers"]}


def _cohere2(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    sliding = layer_types(hf, layers)
    if sliding is None:
        sliding = all_but_every(number(hf, "sliding_window_pattern", int, 4), layers)
    own = dataclasses.replace(rope(hf), interleaved=True)
    ropes = tuple(own if slides else None for slides in sliding)
    return _block(hf) | {"windows": windows(hf, sliding), "ropes": ropes}


COHERE = Family(
    "cohere",
    "CohereConfig",
    "CohereForCausalLM",
    features=_cohere,
    defaults=_DEFAULTS,
    biases=attention_bias,
    modules=PROJECTIONS | {"attn_norm": "input_layernorm"},
    eps="layer_norm_eps",
    differs="attention and MLP in parallel; layer norms; rotation of neighbouring pairs; logit scale",
)
COHERE2 = Family(
    "cohere2",
    "Cohere2Config",
    "Cohere2ForCausalLM",
    features=_cohere2,
    defaults={**_DEFAULTS, "sliding_window": 4096},
    biases=attention_bias,
    modules=PROJECTIONS | {"attn_norm": "input_layernorm"},
    eps="layer_norm_eps",
    differs="as Cohere, with sliding windows in three of four layers, and no rope in the others",
)
