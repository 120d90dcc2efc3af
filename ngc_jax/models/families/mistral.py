"""Mistral and its kin: Ministral with windows in some layers, Ministral 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.llama import llama_gguf
from ngc_jax.models.families.reading import layer_types, number, windows
from ngc_jax.models.families.record import Family, Gguf, attention_bias


def _mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    has_window = hf.get("sliding_window") is not None
    return {"windows": windows(hf, (has_window,) * hf["num_hidden_layers"])}


MISTRAL = Family(
    "mistral",
    "MistralConfig",
    "MistralForCausalLM",
    features=_mistral,
    defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    biases=attention_bias,
    gguf=Gguf("llama", llama_gguf, paired_rotary=True),
    differs="a sliding window in every layer",
)


def _ministral(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    sliding = layer_types(hf, layers)
    return {"windows": windows(hf, (hf.get("sliding_window") is not None,) * layers if sliding is None else sliding)}


MINISTRAL = Family(
    "ministral",
    "MinistralConfig",
    "MinistralForCausalLM",
    features=_ministral,
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
    },
    biases=attention_bias,
    differs="sliding windows in the layers that config.json names",
)

_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384}
_YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def _ministral3(hf: Mapping[str, Any]) -> dict[str, Any]:
    found = _mistral(hf)
    parameters = hf.get("rope_parameters")
    if isinstance(parameters, Mapping) and parameters.get("llama_4_scaling_beta"):
        # Queries are scaled up by the number of times that a position fills this length: below it, by 1.
        original = number(parameters, "original_max_position_embeddings", int)
        found["max_length"] = min(original, number(hf, "max_position_embeddings", int))
    return found


MINISTRAL3 = Family(
    "ministral3",
    "Ministral3Config",
    "Ministral3ForCausalLM",
    features=_ministral3,
    defaults={
        "max_position_embeddings": 262_144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _YARN,
    },
    differs="YaRN; texts up to the original length, above which queries are scaled",
)
