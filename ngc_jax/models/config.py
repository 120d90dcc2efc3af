"""The architecture of a decoder, read from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block
from ngc_jax.models.rope import Rope, rope_from_hf

ATTENTION_ROLES = "qkvo"
MLP_ROLES = "ugd"
ROLES = ATTENTION_ROLES + MLP_ROLES
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Defaults of transformers where config.json has no entry. Published configs rely on them: the text part of gemma 3's
# multimodal ones contains little more than its width and depth.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family. Legend of the shape letters used in `models/`.

    Attributes:
        architecture: One of `ARCHITECTURES`.
        vocab_size: V.
        embed_dim: D, width of the residual stream.
        num_layers: Layers.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: H.
        mlp_dim: F.
        norm_eps: Epsilon of every RMS norm.
        activation: One of `ACTIVATIONS`; the gate's nonlinearity.
        tied_embeddings: Whether the unembedding is the embedding.
        windows: Per layer, the number of tokens it attends to (itself included); None for all.
        ropes: Per layer, its rotary embedding.
        max_length: Longest sequence of pretraining, in tokens.
        qkv_bias: Biases on q, k and v.
        o_bias: Bias on o.
        mlp_bias: Biases on u, g and d.
        qk_norm: RMS norm of every query and key head.
        unit_offset_norm: Norm scales are stored as their difference from one (gemma).
        post_norms: Norms after attention and after the MLP too (gemma).
        embed_scale: Multiplies embeddings.
        attention_scale: Multiplies the attention logits.
        attention_soft_cap: Bounds the attention logits by tanh; None for no bound.
        logit_soft_cap: Bounds the output logits by tanh; None for no bound.
        iterations: How often all layers are applied, one round after the other: above 1 the depth is unrolled
            communication of the same groups, with weights tied between rounds. `ngc_iterations` in config.json, which
            transformers ignores.

    Raises:
        UsageError: If sizes are not positive or inconsistent.
    """

    architecture: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    activation: str
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    max_length: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_offset_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attention_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    iterations: int = 1

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "embed_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "iterations",
        ):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} is {getattr(self, field)}; expected a positive whole number")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"{self.num_heads} heads do not divide among {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation {self.activation!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
            )
        for field in ("windows", "ropes"):
            if len(getattr(self, field)) != self.num_layers:
                raise UsageError(f"{field} has {len(getattr(self, field))} entries for {self.num_layers} layers")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Read the dictionary of a config.json, of transformers 5 or earlier.

        Raises:
            UsageError: If the architecture is not supported, or a setting is missing or invalid.
        """
        hf = text_config(hf)
        architecture = hf.get("model_type")
        if architecture not in ARCHITECTURES:
            raise UsageError(
                f"architecture {architecture!r} (model_type in config.json) is not supported; "
                f"expected one of {', '.join(ARCHITECTURES)}"
            )
        hf = {**_DEFAULTS[architecture], **hf}
        gemma = architecture == "gemma3_text"
        num_layers = _number(hf, "num_hidden_layers", int)
        embed_dim = _number(hf, "hidden_size", int)
        num_heads = _number(hf, "num_attention_heads", int)
        head_dim = _number(hf, "head_dim", int, embed_dim // num_heads)
        attention_bias = bool(hf.get("attention_bias", False))
        if hf.get("use_bidirectional_attention"):
            raise UsageError("bidirectional attention is not supported; expected a causal language model")
        sliding = _sliding_layers(hf, architecture, num_layers)
        window = _number(hf, "sliding_window", int) if any(sliding) else None
        full, local = _ropes(hf, gemma)
        return cls(
            architecture=architecture,
            vocab_size=_number(hf, "vocab_size", int),
            embed_dim=embed_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_number(hf, "num_key_value_heads", int, num_heads),
            head_dim=head_dim,
            mlp_dim=_number(hf, "intermediate_size", int),
            norm_eps=_number(hf, "rms_norm_eps", float),
            activation=str(hf.get("hidden_activation") or hf.get("hidden_act") or "silu"),
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
            windows=tuple(window if is_sliding else None for is_sliding in sliding),
            ropes=tuple(local if is_sliding and gemma else full for is_sliding in sliding),
            max_length=_number(hf, "max_position_embeddings", int),
            qkv_bias=attention_bias or architecture == "qwen2",
            o_bias=attention_bias and architecture != "qwen2",
            mlp_bias=bool(hf.get("mlp_bias", False)) and architecture == "llama",
            iterations=_number(hf, "ngc_iterations", int, 1),
            qk_norm=architecture in ("qwen3", "gemma3_text"),
            unit_offset_norm=gemma,
            post_norms=gemma,
            embed_scale=embed_dim**0.5 if gemma else 1.0,
            attention_scale=(_number(hf, "query_pre_attn_scalar", float) if gemma else head_dim) ** -0.5,
            attention_soft_cap=_soft_cap(hf, "attn_logit_softcapping") if gemma else None,
            logit_soft_cap=_soft_cap(hf, "final_logit_softcapping") if gemma else None,
        )

    def block(self, layer: int, role: str) -> Block:
        """The block that plays `role` (one of `ROLES`) in a layer."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d_out, d_in, bias = {
            "q": (q_dim, self.embed_dim, self.qkv_bias),
            "k": (kv_dim, self.embed_dim, self.qkv_bias),
            "v": (kv_dim, self.embed_dim, self.qkv_bias),
            "o": (self.embed_dim, q_dim, self.o_bias),
            "u": (self.mlp_dim, self.embed_dim, self.mlp_bias),
            "g": (self.mlp_dim, self.embed_dim, self.mlp_bias),
            "d": (self.embed_dim, self.mlp_dim, self.mlp_bias),
        }[role]
        return Block(block_name(layer, role), d_out, d_in, bias)

    def blocks(self) -> tuple[Block, ...]:
        """Every block, layer by layer in the order of `ROLES`."""
        return tuple(self.block(layer, role) for layer in range(self.num_layers) for role in ROLES)


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text decoder in a multimodal model; any other config unchanged."""
    if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), Mapping):
        return {**hf["text_config"], "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return hf


def block_name(layer: int, role: str) -> str:
    """Name of the block that plays `role` in a layer, for example `layers.3.attn.q`."""
    return f"layers.{layer}.{'attn' if role in ATTENTION_ROLES else 'mlp'}.{role}"


# Far above every existing model, and far below what would fill all memory before an error.
_LARGEST = {"num_hidden_layers": 4096, "ngc_iterations": 4096, "head_dim": 65_536}
_LARGEST |= {"max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1}
_LARGEST_SIZE = 2**24


def _number(hf: Mapping[str, Any], name: str, kind: type, default: float | None = None) -> Any:
    """A positive number; `default` if it is null or missing."""
    value = hf.get(name)
    value = default if value is None else value
    most: float = _LARGEST.get(name, _LARGEST_SIZE) if kind is int else 1e18
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    if not usable or value != kind(value):
        what = "whole number" if kind is int else "number"
        raise UsageError(f"{name} in config.json is {brief(value)}; expected a positive {what} up to {most:,}")
    return kind(value)


def brief(value: Any, most: int = 80) -> str:
    """A value as text of limited length, for messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number with too many digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _soft_cap(hf: Mapping[str, Any], name: str) -> float | None:
    return None if hf.get(name) is None else float(_number(hf, name, float))


def _sliding_layers(hf: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers attend to a sliding window only."""
    has_window = hf.get("sliding_window") is not None
    if architecture in ("llama", "mistral"):
        return (has_window and architecture == "mistral",) * num_layers
    if architecture in ("qwen2", "qwen3") and not (has_window and hf.get("use_sliding_window")):
        return (False,) * num_layers
    layer_types = hf.get("layer_types")
    if layer_types is not None:
        kinds = {str(kind) for kind in layer_types}
        if len(layer_types) != num_layers or kinds - {"sliding_attention", "full_attention"}:
            raise UsageError(
                f"layer_types in config.json has {len(layer_types)} entries of {', '.join(sorted(kinds))}; "
                f"expected {num_layers} of sliding_attention or full_attention"
            )
        return tuple(kind == "sliding_attention" for kind in layer_types)
    if architecture == "gemma3_text":
        pattern = _number(hf, "sliding_window_pattern", int, 6)
        return tuple(bool((layer + 1) % pattern) for layer in range(num_layers))
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise UsageError(f"max_window_layers in config.json is {first!r}; expected a whole number")
    return tuple(layer >= first for layer in range(num_layers))


def _ropes(hf: Mapping[str, Any], gemma: bool) -> tuple[Rope, Rope]:
    """The rope of full-attention layers and that of gemma's sliding ones."""
    max_length = _number(hf, "max_position_embeddings", int)
    theta = _number(hf, "rope_theta", float, 1_000_000.0 if gemma else 10_000.0)
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not gemma:
        rope = rope_from_hf(parameters, theta, max_length)
        return rope, rope
    local_theta = _number(hf, "rope_local_base_freq", float, 10_000.0)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full, local = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    else:
        full, local = parameters, {}
    return rope_from_hf(full, theta, max_length), rope_from_hf(local, local_theta, max_length)
