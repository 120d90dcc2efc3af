"""ViT, and DeiT with a distillation token."""

from __future__ import annotations

from ngc_jax.models.families.encoder_record import ATTENTION, CLASSIFIER, EMBEDDINGS, EncoderFamily

_MODULES = ATTENTION | {
    "mlp.u": "intermediate.dense",
    "mlp.d": "output.dense",
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
}
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "qkv_bias": True,
}
_CLASSES = {"pooling": "class", "head": "classes"}
# The pooler of a model without a head is no part of its hidden states.
_IGNORED = ("pooler.", "embeddings.mask_token")

VIT = EncoderFamily(
    "vit",
    "ViTConfig",
    {"ViTForImageClassification": _CLASSES, "ViTModel": {}},
    prefix="vit.",
    layers="encoder.layer",
    modules=_MODULES,
    top=EMBEDDINGS,
    head=CLASSIFIER,
    defaults=_DEFAULTS,
    ignored=_IGNORED,
)
DEIT = EncoderFamily(
    "deit",
    "DeiTConfig",
    {
        "DeiTForImageClassificationWithTeacher": {"pooling": "distilled", "head": "classes"},
        "DeiTForImageClassification": _CLASSES,
        "DeiTModel": {},
    },
    prefix="deit.",
    layers="encoder.layer",
    modules=_MODULES,
    top=EMBEDDINGS | {"embed.distillation_token": "embeddings.distillation_token"},
    head={
        **CLASSIFIER,
        "head.class_classifier.kernel": "cls_classifier.weight",
        "head.class_classifier.bias": "cls_classifier.bias",
        "head.distillation_classifier.kernel": "distillation_classifier.weight",
        "head.distillation_classifier.bias": "distillation_classifier.bias",
    },
    features=lambda hf: {"distillation_token": True},
    defaults=_DEFAULTS,
    ignored=_IGNORED,
    differs="a distillation token, whose classifier is averaged with that of the class token",
)
