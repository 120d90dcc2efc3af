"""DINOv2, with and without registers: layer scale, interpolated positions, MLPs with a gate where enabled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.encoder_record import ATTENTION, CLASSIFIER, EMBEDDINGS, EncoderFamily
from ngc_jax.models.families.reading import number

_MODULES = ATTENTION | {"attn_norm": "norm1", "mlp_norm": "norm2"}
_MODULES |= {"mlp.u": "mlp.fc1", "mlp.d": "mlp.fc2"}
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
}
_HEAD = {"pooling": "class_mean", "head": "classes"}
_SCALES = {"attn.o": "layer_scale1.lambda1", "mlp.d": "layer_scale2.lambda1"}


def _dinov2(hf: Mapping[str, Any]) -> dict[str, Any]:
    # `intermediate_size` is ours, of models with pruned neurons.
    width = number(hf, "intermediate_size", int, int(hf["hidden_size"] * number(hf, "mlp_ratio", float)))
    return {"mlp_dim": width, "interpolates": True, "pooling": "class_mean"}


def _with_registers(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**_dinov2(hf), "antialias": True, "registers": number(hf, "num_register_tokens", int)}


DINOV2 = EncoderFamily(
    "dinov2",
    "Dinov2Config",
    {"Dinov2Model": {}, "Dinov2ForImageClassification": _HEAD},
    prefix="dinov2.",
    layers="encoder.layer",
    modules=_MODULES,
    top=EMBEDDINGS,
    head=CLASSIFIER,
    features=_dinov2,
    defaults=_DEFAULTS,
    scales=_SCALES,
    ignored=("embeddings.mask_token",),
    free_width=False,
    differs="layer scale; positions interpolated to the images; a classifier of the class token and the mean",
)
DINOV2_WITH_REGISTERS = dataclasses.replace(
    DINOV2,
    model_type="dinov2_with_registers",
    config_class="Dinov2WithRegistersConfig",
    heads={"Dinov2WithRegistersModel": {}, "Dinov2WithRegistersForImageClassification": _HEAD},
    prefix="dinov2_with_registers.",
    top=EMBEDDINGS | {"embed.registers": "embeddings.register_tokens"},
    features=_with_registers,
    defaults=_DEFAULTS | {"num_register_tokens": 4},
    differs="as DINOv2, with register tokens",
)
