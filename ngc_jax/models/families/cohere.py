"""Command R and Command A: attention and MLP side by side, layer norms, rotation by pairs of neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import FULL, SLIDING, all_but_every, layer_types, number, rope, windows
from ngc_jax.models.families.record import PROJECTIONS, Family, Gguf, GgufKeys, attention_bias, only_in_hf

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

_PATTERN = 4

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
        sliding = all_but_every(number(hf, "sliding_window_pattern", int, _PATTERN), layers)
    own = dataclasses.replace(rope(hf), interleaved=True)
    ropes = tuple(own if slides else None for slides in sliding)
    # transformers does not read head_dim.
    head_dim = max(hf["hidden_size"] // hf["num_attention_heads"], 1)
    heads = {"head_dim": head_dim, "attention_scale": head_dim**-0.5}
    return _block(hf) | heads | {"windows": windows(hf, sliding), "ropes": ropes}


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {"hidden_act": "silu", "logit_scale": keys.real("logit_scale"), "attention_bias": bool(biased)}


def _settings2(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    sliding = all_but_every(_PATTERN, config["num_hidden_layers"])
    kinds = [SLIDING if slides else FULL for slides in sliding]
    window = keys.integer("attention.sliding_window")
    return {**_settings(keys, config, biased), "sliding_window": window, "layer_types": kinds}


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    only_in_hf(config, biases=config.qkv_bias, a_head_of_its_own=not config.tied_embeddings)
    return {"logit_scale": config.logit_scale}


def _metadata2(config: DecoderConfig) -> dict[str, Any]:
    sliding = tuple(window is not None for window in config.windows)
    others = sliding != all_but_every(_PATTERN, config.num_layers)
    only_in_hf(config, other_sliding_layers_than_three_of_four=others)
    return _metadata(config) | {"attention.sliding_window": config.windows[0]}


COHERE = Family(
    "cohere",
    "CohereConfig",
    "CohereForCausalLM",
    features=_cohere,
    defaults=_DEFAULTS,
    biases=attention_bias,
    modules=PROJECTIONS | {"attn_norm": "input_layernorm"},
    gguf=Gguf("command-r", _settings, _metadata, eps="attention.layer_norm_epsilon"),
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
    gguf=Gguf("cohere2", _settings2, _metadata2, eps="attention.layer_norm_epsilon"),
    eps="layer_norm_eps",
    differs="as Cohere, with sliding windows in three of four layers, and no rope in the others",
)
