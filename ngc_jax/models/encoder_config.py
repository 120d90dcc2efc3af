"""The architecture of an image encoder, read from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.families.encoder_record import EncoderFamily
from ngc_jax.models.families.encoders import encoder_config_json, encoder_family
from ngc_jax.models.families.reading import brief, number

Pooling = Literal["class", "class_mean", "mean", "attention", "distilled"]
Head = Literal["classes", "projection"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig(DecoderConfig):
    """The features of an image encoder: those of its layers, which are a decoder's, and those of its two ends.

    Of the fields that it shares with a decoder, `vocab_size` (V) is the number of outputs, and `max_length` (L) the
    number of tokens of an image of `image_size`.

    Attributes:
        image_size: S, height and width of an image, in pixels.
        patch_size: P, height and width of a patch.
        channels: C.
        class_token: A learned first token.
        distillation_token: A learned second token.
        registers: Number of learned tokens without positions, before the patches.
        patch_bias: The patch embedding adds a bias.
        embed_norm: Embeddings are normed before the first layer.
        interpolates: Position embeddings are interpolated to images of other sizes, which are otherwise refused.
        antialias: They are interpolated with antialiasing.
        flat_embeddings: The class token is stored as (D,) and positions as (L, D), without axes of size one.
        pooling: How tokens become one vector: the class token; it and the mean of the patches; the mean; by attention;
            or the class and distillation tokens.
        pool_dim: Width of the MLP that follows pooling by attention; 0 for other poolings.
        head: How outputs are computed from it: classes, with biases, or a projection; None for the vector itself.

    Raises:
        UsageError: If sizes are not positive or inconsistent.

    Example:
        >>> config = EncoderConfig.from_hf({"model_type": "vit", "num_labels": 10})
        >>> config.max_length, config.vocab_size, config.roles
        (197, 10, 'qkvoud')
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    patch_bias: bool = True
    embed_norm: bool = False
    interpolates: bool = False
    antialias: bool = False
    flat_embeddings: bool = False
    pooling: Pooling = "class"
    pool_dim: int = 0
    head: Head | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise UsageError(
                f"images of {self.image_size} pixels have no patch of {self.patch_size}; check config.json"
            )
        if self.num_heads * self.head_dim != self.embed_dim:
            raise UsageError(f"{self.num_heads} heads do not divide {self.embed_dim} dimensions; check config.json")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Read the dictionary of a config.json, also of a model with an image tower.

        Raises:
            UsageError: If the architecture is not supported, or a setting is missing or invalid.
        """
        hf = encoder_config_json(hf)
        family = encoder_family(hf.get("model_type"))
        hf = {**family.defaults, **hf}
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        hf |= {name: number(hf, name, int) for name in names}
        layers, width, heads = (hf[name] for name in names)
        qkv_bias = bool(hf["qkv_bias"])
        fields: dict[str, Any] = {
            "architecture": family.model_type,
            "embed_dim": width,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": max(width // heads, 1),
            "norm_eps": number(hf, "layer_norm_eps", float),
            "activation": str(hf["hidden_act"]),
            "tied_embeddings": False,
            "windows": (None,) * layers,
            "ropes": (None,) * layers,
            "qkv_bias": qkv_bias,
            "o_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "norm": "layer",
            "norm_bias": True,
            "attention_scale": max(width // heads, 1) ** -0.5,
            "causal": False,
            "image_size": _square(hf, "image_size"),
            "patch_size": _square(hf, "patch_size"),
            "channels": number(hf, "num_channels", int, 3),
            **family.features(hf),
            **_head(hf, family),
        }
        if hf.get("use_swiglu_ffn"):
            raise UsageError(f"{family.model_type} with use_swiglu_ffn is not supported; expected MLPs without a gate")
        if "mlp_dim" not in fields:
            fields["mlp_dim"] = number(hf, "intermediate_size", int)
        side = fields["image_size"] // fields["patch_size"]
        special = fields.get("class_token", True) + fields.get("distillation_token", False)
        fields["max_length"] = max(side * side + special + fields.get("registers", 0), 1)
        fields["vocab_size"] = {
            "classes": lambda: _labels(hf),
            "projection": lambda: number(hf, "projection_dim", int),
            None: lambda: width * (2 if fields.get("pooling") == "class_mean" else 1),
        }[fields.get("head")]()
        return cls(**fields)

    @property
    def special_tokens(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.distillation_token + self.registers

    def tokens_of(self, height: int, width: int) -> int:
        """Number of tokens of an image.

        Raises:
            UsageError: If its size is not the model's, and positions are not interpolated.
        """
        if (height, width) != (self.image_size, self.image_size) and not self.interpolates:
            raise UsageError(
                f"images are of {height} x {width} pixels, and {self.architecture} has positions for "
                f"{self.image_size} x {self.image_size}; resize them"
            )
        if min(height, width) < self.patch_size:
            raise UsageError(f"images of {height} x {width} pixels have no patch of {self.patch_size}; resize them")
        return (height // self.patch_size) * (width // self.patch_size) + self.special_tokens


def _square(hf: Mapping[str, Any], name: str) -> int:
    """A size that config.json may give once or for both axes."""
    value = hf.get(name)
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise UsageError(f"{name} in config.json is {brief(value)}; expected a square")
        value = value[0]
    size: int = number({**hf, name: value}, name, int)
    return size


def _head(hf: Mapping[str, Any], family: EncoderFamily) -> Mapping[str, Any]:
    named = hf.get("architectures") or [family.model_class]
    head = family.heads.get(str(named[0]))
    if head is None:
        raise UsageError(f"{brief(named[0])} is not supported; expected {' or '.join(family.heads)}")
    return head


def _labels(hf: Mapping[str, Any]) -> int:
    """The number of classes: `num_labels`, or the entries of `id2label`; 2 if both are missing, as in transformers."""
    named = hf.get("id2label")
    if isinstance(named, Mapping) and named:
        return len(named)
    count: int = number(hf, "num_labels", int, 2)
    return count
