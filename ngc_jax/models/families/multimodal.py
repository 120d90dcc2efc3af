"""Multimodal models, of which the text decoder is read: its config.json, and the tensors of the other parts.

Text alone has the same position in all dimensions of a multimodal rotary embedding, which is then a plain one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.registry import FAMILIES


@dataclasses.dataclass(frozen=True, eq=False)
class Multimodal:
    """A model with a text decoder of one of our families.

    Attributes:
        model_type: Of the whole model.
        text_type: Type of its text decoder as a model of its own; None for the type that config.json names.
        defaults: Where they are not those of that type.
        flat: Some files have the entries of the text decoder at the top.
    """

    model_type: str
    text_type: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flat: bool = False


_QWEN2 = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
MULTIMODAL = {
    model.model_type: model
    for model in (
        Multimodal("gemma3", "gemma3_text"),
        Multimodal("mistral3", defaults={"model_type": "mistral"}),
        Multimodal("qwen2_vl", "qwen2", _QWEN2, flat=True),
        Multimodal("qwen2_5_vl", "qwen2", _QWEN2, flat=True),
        Multimodal("qwen3_vl", "qwen3", {"rope_theta": 500_000.0, "rms_norm_eps": 1e-6}),
    )
}
# Tensors of the other parts begin with one of these.
OTHER_PARTS = ("vision_tower", "multi_modal_projector", "visual")
_ROPES = ("rope_parameters", "rope_scaling")


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text decoder in a multimodal model; any other config unchanged."""
    model = MULTIMODAL.get(str(hf.get("model_type")))
    inner = hf.get("text_config")
    if model is not None and model.flat and inner is None and "hidden_size" in hf:
        inner = {name: value for name, value in hf.items() if name != "vision_config"}
    if model is None or not isinstance(inner, Mapping):
        return hf
    text = {**model.defaults, **inner}
    if model.text_type is not None:
        text["model_type"] = model.text_type
    if "tie_word_embeddings" in hf:
        text["tie_word_embeddings"] = hf["tie_word_embeddings"]
    family = FAMILIES.get(str(text["model_type"]))
    if family is not None:
        text["architectures"] = [family.model_class]
    return text | {name: _plain_rope(text[name]) for name in _ROPES if isinstance(text.get(name), Mapping)}


def _plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in parameters.items() if not name.startswith("mrope_")}
    return {name: "default" if value == "mrope" else value for name, value in kept.items()}
