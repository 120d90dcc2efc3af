"""GPT-2: learned positions instead of rotary embeddings, and matrices that are stored transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import activation
from ngc_jax.models.families.record import Family

# Of Llama's config.json -> of GPT-2's. transformers reads both.
_ENTRIES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_REFUSED = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")


def _standard(hf: Mapping[str, Any]) -> dict[str, Any]:
    found = {**hf, **{name: hf[own] for name, own in _ENTRIES.items() if hf.get(own) is not None}}
    width = hf.get("n_inner")
    if width is None and isinstance(found.get("hidden_size"), int):
        width = 4 * found["hidden_size"]
    return {**found, "intermediate_size": width}  # which transformers does not read


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    for name in _REFUSED:
        if hf.get(name):
            raise UsageError(f"gpt2 models with {name} are not supported; expected it to be false in config.json")
    # transformers reads neither key-value heads nor head_dim.
    head_dim = max(hf["hidden_size"] // hf["num_attention_heads"], 1)
    return {
        "num_kv_heads": hf["num_attention_heads"],
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5 if hf.get("scale_attn_weights") else 1.0,
        "ropes": (None,) * hf["num_hidden_layers"],
        "activation": activation(hf.get("activation_function")),
        "gated_mlp": False,
        "norm": "layer",
        "norm_bias": True,
        "learned_positions": True,
    }


GPT2 = Family(
    "gpt2",
    "GPT2Config",
    "GPT2LMHeadModel",
    features=_gpt2,
    defaults={
        "max_position_embeddings": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    biases=lambda hf: (True, True, True),
    # Of the matrices as they are here, which files of GPT-2 have transposed and by the names in `fused`.
    modules={
        "attn.q": "attn.q_proj",
        "attn.k": "attn.k_proj",
        "attn.v": "attn.v_proj",
        "attn.o": "attn.o_proj",
        "mlp.u": "mlp.up_proj",
        "mlp.d": "mlp.down_proj",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
    },
    fused={
        "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attn.c_proj": ("attn.o_proj",),
        "mlp.c_fc": ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
    transposed=True,
    layers="transformer.h",
    top={
        "embed.embedding": "transformer.wte.weight",
        "position_embed.embedding": "transformer.wpe.weight",
        "norm.scale": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    },
    standard=_standard,
    width="n_inner",
    eps="layer_norm_epsilon",
    differs="learned positions; fused q, k and v; layer norms and blocks with biases; MLPs without a gate",
)
