"""GPT-NeoX, with Pythia: attention and MLP in parallel, each with a norm of its own, and q, k and v fused by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.reading import activation, rope
from ngc_jax.models.families.record import PRE_NORMS, Family


def _standard(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Files of transformers before version 5 have other names of the rope's settings.
    return {"partial_rotary_factor": hf.get("rotary_pct"), **hf}


def _neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers reads neither key-value heads nor head_dim.
    head_dim = max(hf["hidden_size"] // hf["num_attention_heads"], 1)
    in_parallel = bool(hf.get("use_parallel_residual"))
    return {
        "num_kv_heads": hf["num_attention_heads"],
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "ropes": (rope(hf, theta_entry="rotary_emb_base", share=0.25),) * hf["num_hidden_layers"],
        "activation": activation(hf.get("hidden_act")),
        "gated_mlp": False,
        "norm": "layer",
        "norm_bias": True,
        "parallel": in_parallel,
        "parallel_norms": in_parallel,
    }


def _biases(hf: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    attention = bool(hf.get("attention_bias"))
    return attention, attention, True


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    features=_neox,
    defaults={
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    biases=_biases,
    modules={
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.o": "attention.dense",
        "mlp.u": "mlp.dense_h_to_4h",
        "mlp.d": "mlp.dense_4h_to_h",
        **PRE_NORMS,
    },
    fused={"attention.query_key_value": ("attention.q_proj", "attention.k_proj", "attention.v_proj")},
    by_head=True,
    layers="gpt_neox.layers",
    top={
        "embed.embedding": "gpt_neox.embed_in.weight",
        "norm.scale": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "unembed.kernel": "embed_out.weight",
    },
    standard=_standard,
    eps="layer_norm_eps",
    differs="attention and MLP in parallel, each with a norm; fused q, k and v; layer norms and blocks with biases; "
    "MLPs without a gate; quarter-rotated heads",
)
