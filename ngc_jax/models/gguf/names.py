"""GGUF's names of a decoder's parameters."""

from __future__ import annotations

# GGUF's names outside of layers -> Hugging Face's.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# GGUF's names within a layer -> our modules.
IN_LAYER = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.g",
    "ffn_up": "mlp.u",
    "ffn_down": "mlp.d",
    "post_ffw_norm": "mlp_post_norm",
}
# GGUF's names of tensors of several matrices -> Hugging Face's, in families that have them.
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_OUTSIDE = {"embed.embedding": "token_embd", "norm.scale": "output_norm", "unembed.kernel": "output"}
_PARTS = {module: part for part, module in IN_LAYER.items()}


def gguf_name(parameter: str) -> str:
    """GGUF's name of a parameter.

    >>> gguf_name("layers.3.attn.q.kernel")
    'blk.3.attn_q.weight'
    """
    if parameter in _OUTSIDE:
        return f"{_OUTSIDE[parameter]}.weight"
    _, layer, rest = parameter.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{_PARTS[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def gguf_fused_name(hf_name: str) -> str:
    """GGUF's name of a tensor of several matrices, by Hugging Face's.

    >>> gguf_fused_name("model.layers.3.mlp.gate_up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    _, _, layer, part, module, leaf = hf_name.split(".")
    own = next(own for own, theirs in FUSED.items() if theirs == f"{part}.{module}")
    return f"blk.{layer}.{own}.{leaf}"
