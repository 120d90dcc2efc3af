"""Multimodal models, of which the text decoder is read: its config.json, and the tensors of the other parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """A model with a text decoder of one of our families.

    Attributes:
        model_type: Of the whole model.
        text_type: Type of its text decoder as a model of its own.
        text_class: transformers' class of that.
    """

    model_type: str
    text_type: str
    text_class: str


MULTIMODAL = {model.model_type: model for model in (Multimodal("gemma3", "gemma3_text", "Gemma3ForCausalLM"),)}
# Tensors of the other parts begin with one of these.
OTHER_PARTS = ("vision_tower", "multi_modal_projector")


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text decoder in a multimodal model; any other config unchanged."""
    model = MULTIMODAL.get(str(hf.get("model_type")))
    if model is None or not isinstance(hf.get("text_config"), Mapping):
        return hf
    return {**hf["text_config"], "model_type": model.text_type, "architectures": [model.text_class]}
