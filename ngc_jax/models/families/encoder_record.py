"""What one family of image encoders is: a record that the rest of the package reads, and that names no other family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

SHARED = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj"}
SHARED |= {"attn.o": "self_attn.out_proj", "mlp.u": "mlp.fc1", "mlp.d": "mlp.fc2"}
SHARED |= {"attn_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
"""Our modules of a layer -> those of towers of two-tower models."""

ATTENTION = {"attn.q": "attention.attention.query", "attn.k": "attention.attention.key"}
ATTENTION |= {"attn.v": "attention.attention.value", "attn.o": "attention.output.dense"}
"""Our blocks of attention -> those of ViT and its close kin."""

PATCHES = "embeddings.patch_embeddings.projection"
EMBEDDINGS = {
    "embed.patch.kernel": f"{PATCHES}.weight",
    "embed.patch.bias": f"{PATCHES}.bias",
    "embed.class_token": "embeddings.cls_token",
    "embed.positions": "embeddings.position_embeddings",
    "norm.scale": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
"""Our parameters outside layers -> those of ViT and its close kin."""

CLASSIFIER = {"head.classifier.kernel": "classifier.weight", "head.classifier.bias": "classifier.bias"}


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderFamily:
    """A family of image encoders, known by the `model_type` of its config.json.

    Attributes:
        model_type: Of config.json.
        config_class: transformers' class of its config.
        heads: transformers' classes of its models -> the fields of `EncoderConfig` by which they differ. The first is
            that of a config.json that names none.
        prefix: Before the names of the tensors of everything but heads; files of a model without a head leave it out.
        layers: Hugging Face's name of the layers, after the prefix.
        modules: Our modules of a layer -> Hugging Face's.
        top: Our other parameters, but for heads -> Hugging Face's, after the prefix.
        head: Our parameters of heads -> Hugging Face's, without a prefix.
        features: From config.json to further fields of `EncoderConfig`.
        defaults: What transformers assumes where config.json is silent.
        scales: Blocks whose outputs are multiplied by a tensor of the layer -> its name. The tensor is folded into the
            block when it is read, and written as ones.
        ignored: Beginnings of the names, without the prefix, of tensors that no output depends on.
        free_width: Whether transformers loads models whose MLPs have any width, which config.json says.
        differs: In what it differs from ViT, for documentation.
    """

    model_type: str
    config_class: str
    heads: Mapping[str, Mapping[str, Any]]
    prefix: str
    layers: str
    modules: Mapping[str, str]
    top: Mapping[str, str]
    head: Mapping[str, str] = dataclasses.field(default_factory=dict)
    features: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    free_width: bool = True
    differs: str = ""

    @property
    def model_class(self) -> str:
        """Transformers' class of a model whose config.json names none."""
        return next(iter(self.heads))

    def hf_name(self, parameter: str) -> str:
        """Hugging Face's name of a parameter, for example `layers.3.attn.q.kernel`.

        Raises:
            KeyError: If the family has no such parameter.
        """
        if parameter in self.head:
            return self.head[parameter]
        if parameter in self.top:
            return f"{self.prefix}{self.top[parameter]}"
        _, layer, rest = parameter.split(".", 2)
        module, leaf = rest.rsplit(".", 1)
        return f"{self.layer(int(layer))}.{self.modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"

    def layer(self, number: int) -> str:
        """Hugging Face's name of a layer."""
        return f"{self.prefix}{self.layers}.{number}"
