"""All families of image encoders by their `model_type`, and the image towers of two-tower models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from ngc_jax.models.families.encoder_record import EncoderFamily
from ngc_jax.models.families.towers import CLIP, SIGLIP
from ngc_jax.models.families.vit import DEIT, VIT

ENCODERS: dict[str, EncoderFamily] = {
    family.model_type: family for family in (VIT, DEIT, DINOV2, DINOV2_WITH_REGISTERS, SIGLIP, CLIP)
}
"""In the order of documentation."""

# Models with an image tower -> the type of the tower as a model of its own, and its class.
TOWERS = {
    "siglip": ("siglip_vision_model", "SiglipVisionModel"),
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection"),
}
# Tensors of the other parts begin with one of these.
OTHER_TOWER = ("text_model.", "text_projection.", "logit_scale", "logit_bias")


def is_encoder(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json describes an image encoder, or a model with an image tower that we read.

    Example:
        >>> is_encoder({"model_type": "vit"}), is_encoder({"model_type": "llama"})
        (True, False)
    """
    kind = hf.get("model_type")
    return isinstance(kind, str) and (kind in ENCODERS or kind in TOWERS)


def encoder_config_json(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the image tower in a two-tower model; any other config unchanged.

    Raises:
        UsageError: If a two-tower model has no section for its image tower, or is none of two towers.
    """
    tower = TOWERS.get(str(hf.get("model_type")))
    if tower is None:
        return dict(hf)
    inner = hf.get("vision_config")
    if not isinstance(inner, Mapping):
        raise UsageError(f"config.json of type {hf['model_type']!r} has no vision_config; download the model again")
    kind, architecture = tower
    if (named := list(hf.get("architectures") or ())) and "ForImageClassification" in str(named[0]):
        raise UsageError(f"{named[0]} is not supported; expected a model of two towers, or an image tower")
    own = {"projection_dim": hf["projection_dim"]} if "projection_dim" in hf else {}
    return {**inner, **own, "model_type": kind, "architectures": [architecture]}


def encoder_family(model_type: Any) -> EncoderFamily:
    """The family of a `model_type`.

    Raises:
        UsageError: If it is not supported.
    """
    if isinstance(model_type, str) and model_type in ENCODERS:
        return ENCODERS[model_type]
    raise UsageError(f"image encoder {model_type!r} is not supported; expected one of {', '.join(ENCODERS)}")


def encoder_table(errors: Mapping[str, float] | None = None) -> str:
    """One row in Markdown for every family of image encoders.

    Args:
        errors: The worst difference of outputs from transformers', by `model_type`; without a column for it if None.

    Example:
        >>> print(encoder_table().splitlines()[2])
        | `vit` | `ViTForImageClassification`, `ViTModel` | |
    """
    head = ["`model_type`", "in transformers", "beside ViT's features"]
    rows = [
        [f"`{family.model_type}`", ", ".join(f"`{name}`" for name in family.heads), family.differs]
        for family in ENCODERS.values()
    ]
    rows += [[f"`{name}`", "", f"its image tower, as `{kind}`"] for name, (kind, _) in TOWERS.items()]
    if errors is not None:
        head.append("worst difference of outputs")
        rows = [[*row, f"{errors[name]:.0e}" if (name := row[0].strip("`")) in errors else ""] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " ".join(f"{cell} |" if cell else "|" for cell in line) for line in lines)
