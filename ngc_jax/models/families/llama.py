"""Llama, and the family that GGUF files of its architecture with biases belong to."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ngc_jax.models.families.record import Family, Gguf, GgufKeys, all_biases

GGUF_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
GGUF_ATTENTION = GGUF_QKV | {"attn_output"}


def llama_gguf(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    """Settings of the class that has a place for every bias of the file.

    Llama's class has biases on all four attention blocks or on none, and on all three of the MLP or on none; Qwen 2's
    has them on q, k and v alone.
    """
    if biased and biased <= GGUF_QKV:
        return qkv_biased()
    attention, mlp = bool(biased & GGUF_ATTENTION), bool(biased - GGUF_ATTENTION)
    return llama_class() | {"hidden_act": "silu", "attention_bias": attention, "mlp_bias": mlp}


def llama_class() -> dict[str, Any]:
    """The entries of config.json that make a model a Llama."""
    return {"architectures": [LLAMA.model_class], "model_type": LLAMA.model_type}


def qkv_biased() -> dict[str, Any]:
    """The entries of config.json of a Llama with biases on q, k and v alone."""
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {"hidden_act": "silu", **kind, "use_sliding_window": False}


LLAMA = Family(
    "llama",
    "LlamaConfig",
    "LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    biases=all_biases,
    gguf=Gguf("llama", llama_gguf, paired_rotary=True),
)
