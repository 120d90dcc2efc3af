"""The image towers of CLIP and SigLIP."""

from __future__ import annotations

from ngc_jax.models.families.encoder_record import SHARED, EncoderFamily
from ngc_jax.models.families.reading import number

_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "qkv_bias": True,
}
_TOP = {
    "embed.patch.kernel": "embeddings.patch_embedding.weight",
    "embed.positions": "embeddings.position_embedding.weight",
    "norm.scale": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_POOL = {"probe": "probe", "norm.scale": "layernorm.weight", "norm.bias": "layernorm.bias"}
_POOL |= {"attention.kernel": "attention.in_proj_weight", "attention.bias": "attention.in_proj_bias"}
for _ours, _theirs in {"out": "attention.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}.items():
    _POOL |= {f"{_ours}.kernel": f"{_theirs}.weight", f"{_ours}.bias": f"{_theirs}.bias"}

SIGLIP = EncoderFamily(
    "siglip_vision_model",
    "SiglipVisionConfig",
    {"SiglipVisionModel": {}},
    prefix="vision_model.",
    layers="encoder.layers",
    modules=SHARED,
    top=_TOP
    | {"embed.patch.bias": "embeddings.patch_embedding.bias"}
    | {f"head.pool.{ours}": f"head.{theirs}" for ours, theirs in _POOL.items()},
    features=lambda hf: {
        "class_token": False,
        "flat_embeddings": True,
        "pooling": "attention" if hf.get("vision_use_head", True) else "mean",
        # Ours, of models with pruned neurons.
        "pool_dim": number(hf, "pool_intermediate_size", int, number(hf, "intermediate_size", int)),
    },
    defaults=_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16},
    ignored=("embeddings.position_ids",),
    free_width=False,
    differs="no class token; pooled by attention",
)
CLIP = EncoderFamily(
    "clip_vision_model",
    "CLIPVisionConfig",
    {"CLIPVisionModel": {}, "CLIPVisionModelWithProjection": {"head": "projection"}},
    prefix="vision_model.",
    layers="encoder.layers",
    modules=SHARED,
    top=_TOP
    | {"embed.class_token": "embeddings.class_embedding"}
    | {"embed.norm.scale": "pre_layrnorm.weight", "embed.norm.bias": "pre_layrnorm.bias"},
    head={"head.projection.kernel": "visual_projection.weight"},
    features=lambda hf: {"patch_bias": False, "embed_norm": True, "flat_embeddings": True},
    defaults=_DEFAULTS | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32, "projection_dim": 512},
    ignored=("embeddings.position_ids",),
    differs="a norm of the embeddings; a projection of the class token where the file has one",
)
