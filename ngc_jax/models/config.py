"""The architecture of a decoder, read from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block
from ngc_jax.models.families import family_of, text_config
from ngc_jax.models.families.reading import brief, number, rope
from ngc_jax.models.rope import Rope

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_ROLES",
    "MLP_ROLES",
    "ROLES",
    "DecoderConfig",
    "Experts",
    "block_name",
    "brief",
    "check_length",
    "language_only",
    "text_config",
    "without_experts",
]

ATTENTION_ROLES = "qkvo"
MLP_ROLES = "ugd"
ROLES = ATTENTION_ROLES + MLP_ROLES
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixtures of experts of a decoder: MLPs of which a router chooses a few for each token.

    A token's experts are those with the greatest router logits, and its output is the sum of theirs, weighted by the
    softmax of the logits. Whether the softmax is taken before or after the choice makes no other difference than
    whether the weights of the chosen experts sum to one, which `normalised` says.

    Attributes:
        count: E, experts of a layer.
        per_token: Experts that each token is routed to.
        width: F of every expert.
        layers: By layer, whether its MLP is a mixture of experts.
        normalised: A token's weights sum to one.

    Raises:
        UsageError: If a number is not positive, or a token is routed to more experts than there are.
    """

    count: int
    per_token: int
    width: int
    layers: tuple[bool, ...]
    normalised: bool = True

    def __post_init__(self) -> None:
        for field in ("count", "per_token", "width"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} of experts is {getattr(self, field)}; expected a positive whole number")
        if self.per_token > self.count:
            raise UsageError(f"{self.per_token} experts per token, of {self.count}; expected at most all of them")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The features of a decoder. Legend of the shape letters used in `models/`.

    Attributes:
        architecture: The family, by its name in `families.FAMILIES`.
        vocab_size: V.
        embed_dim: D, width of the residual stream.
        num_layers: Layers.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: H.
        mlp_dim: F.
        norm_eps: Epsilon of every norm.
        activation: One of `ACTIVATIONS`; the gate's nonlinearity, or of an MLP without a gate that of up.
        tied_embeddings: Whether the unembedding is the embedding.
        windows: Per layer, the number of tokens it attends to (itself included); None for all.
        ropes: Per layer, its rotary embedding; None for none.
        max_length: Longest sequence of pretraining, in tokens.
        qkv_bias: Biases on q, k and v.
        o_bias: Bias on o.
        mlp_bias: Biases on u, g and d.
        gated_mlp: MLPs multiply up by a gate; otherwise the decoder has no role g.
        norm: Root-mean-square norms (rms), or layer norms, which subtract the mean (layer).
        norm_bias: Norms add a bias.
        qk_norm: RMS norms of queries and keys: of every head, or of all heads as a whole; None for none.
        unit_offset_norm: Norm scales are stored as their difference from one.
        pre_norms: Norms before attention and before the MLP.
        post_norms: Norms after attention and after the MLP.
        parallel: Attention and the MLP read the same stream, and are added to it together.
        parallel_norms: In parallel, the MLP reads a norm of its own; otherwise that of attention.
        learned_positions: A vector for each position up to `max_length` is added to embeddings.
        residual_scale: Multiplies what attention and the MLP add to the stream.
        embed_scale: Multiplies embeddings.
        attention_scale: Multiplies the attention logits.
        attention_soft_cap: Bounds the attention logits by tanh; None for no bound.
        logit_scale: Multiplies the output logits.
        logit_soft_cap: Bounds the output logits by tanh; None for no bound.
        iterations: How often all layers are applied, one round after the other: above 1 the depth is unrolled
            communication of the same groups, with weights tied between rounds. `ngc_iterations` in config.json, which
            transformers ignores.
        experts: The layers whose MLPs are mixtures of experts; None if there are none.
        causal: No token sees a later one; otherwise, as in `EncoderConfig`, all see each other.

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
    ropes: tuple[Rope | None, ...]
    max_length: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    qk_norm: Literal["head", "whole"] | None = None
    unit_offset_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    parallel_norms: bool = False
    learned_positions: bool = False
    residual_scale: float = 1.0
    embed_scale: float = 1.0
    attention_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    iterations: int = 1
    experts: Experts | None = None
    causal: bool = True

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
        if self.head_dim % 2 and any(self.ropes):
            raise UsageError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        for share in {one.share for one in self.ropes if one is not None}:
            if (rotated := int(self.head_dim * share)) < 2 or rotated % 2:
                raise UsageError(f"{rotated} dimensions of a head are rotated; expected a positive even number")
        if self.parallel and (self.post_norms or not self.pre_norms):
            raise UsageError("parallel attention and MLP have a norm before them, and none after them")
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation {self.activation!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
            )
        for field in ("windows", "ropes"):
            if len(getattr(self, field)) != self.num_layers:
                raise UsageError(f"{field} has {len(getattr(self, field))} entries for {self.num_layers} layers")
        if self.experts is not None and (len(self.experts.layers) != self.num_layers or self.mlp_bias):
            raise UsageError("experts have no biases, and each layer has experts or not")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Read the dictionary of a config.json, of transformers 5 or earlier.

        Raises:
            UsageError: If the architecture is not supported, or a setting is missing or invalid.
        """
        hf = text_config(hf)
        family = family_of(hf.get("model_type"))
        hf = dict(family.standard({**family.defaults, **hf}))
        # As numbers, for what the family reads after them.
        hf |= {name: number(hf, name, int) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
        layers = hf["num_hidden_layers"]
        head_dim = number(hf, "head_dim", int, hf["hidden_size"] // hf["num_attention_heads"])
        qkv_bias, o_bias, mlp_bias = family.biases(hf)
        fields: dict[str, Any] = {
            "architecture": family.model_type,
            "vocab_size": number(hf, "vocab_size", int),
            "embed_dim": hf["hidden_size"],
            "num_layers": layers,
            "num_heads": hf["num_attention_heads"],
            "num_kv_heads": number(hf, "num_key_value_heads", int, hf["num_attention_heads"]),
            "head_dim": head_dim,
            "mlp_dim": number(hf, "intermediate_size", int),
            "norm_eps": number(hf, family.eps, float),
            "activation": str(hf.get("hidden_activation") or hf.get("hidden_act") or "silu"),
            "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "windows": (None,) * layers,
            "max_length": number(hf, "max_position_embeddings", int),
            "qkv_bias": qkv_bias,
            "o_bias": o_bias,
            "mlp_bias": mlp_bias,
            "iterations": number(hf, "ngc_iterations", int, 1),
            "attention_scale": head_dim**-0.5,
            **family.features(hf),
        }
        if isinstance(fields.get("experts"), Mapping):
            fields["experts"] = Experts(**fields["experts"])
        if "ropes" not in fields:
            fields["ropes"] = (rope(hf),) * layers
        return cls(**fields)

    @property
    def mlp_roles(self) -> str:
        """The roles of its MLPs."""
        return MLP_ROLES if self.gated_mlp else MLP_ROLES.replace("g", "")

    @property
    def roles(self) -> str:
        """Its roles, in the order of `ROLES`."""
        return ATTENTION_ROLES + self.mlp_roles

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def block(self, layer: int, role: str, expert: int | None = None) -> Block:
        """The block that plays `role` (one of `roles`) in a layer.

        Args:
            layer: From 0.
            role: One of `roles`.
            expert: Of which expert, from 0, for a role of an MLP in a layer with experts; None otherwise.

        Raises:
            KeyError: If there is no such block.
        """
        of_expert = self.is_sparse(layer) and role in MLP_ROLES
        if role not in self.roles or of_expert != (expert is not None):
            raise KeyError(block_name(layer, role, expert))
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp_dim = self.experts.width if of_expert and self.experts is not None else self.mlp_dim
        d_out, d_in, bias = {
            "q": (q_dim, self.embed_dim, self.qkv_bias),
            "k": (kv_dim, self.embed_dim, self.qkv_bias),
            "v": (kv_dim, self.embed_dim, self.qkv_bias),
            "o": (self.embed_dim, q_dim, self.o_bias),
            "u": (mlp_dim, self.embed_dim, self.mlp_bias),
            "g": (mlp_dim, self.embed_dim, self.mlp_bias),
            "d": (self.embed_dim, mlp_dim, self.mlp_bias),
        }[role]
        return Block(block_name(layer, role, expert), d_out, d_in, bias)

    def layer_blocks(self, layer: int) -> tuple[Block, ...]:
        """Every block of a layer, in the order of `roles`, those of experts in their order."""
        found = []
        for role in self.roles:
            if self.experts is not None and self.is_sparse(layer) and role in MLP_ROLES:
                found += [self.block(layer, role, expert) for expert in range(self.experts.count)]
            else:
                found.append(self.block(layer, role))
        return tuple(found)

    def blocks(self) -> tuple[Block, ...]:
        """Every block, layer by layer in the order of `roles`."""
        return tuple(block for layer in range(self.num_layers) for block in self.layer_blocks(layer))


def block_name(layer: int, role: str, expert: int | None = None) -> str:
    """Name of the block that plays `role` in a layer, such as `layers.3.attn.q`; of expert 5, `layers.3.mlp.u.5`."""
    name = f"layers.{layer}.{'attn' if role in ATTENTION_ROLES else 'mlp'}.{role}"
    return name if expert is None else f"{name}.{expert}"


def check_length(config: DecoderConfig, length: int) -> None:
    """Refuse texts that are longer than the table of a decoder with learned positions.

    Args:
        config: The decoder.
        length: Of the longest text, in tokens.

    Raises:
        UsageError: If the decoder has such a table, and it is shorter.
    """
    if config.learned_positions and length > config.max_length:
        raise UsageError(
            f"{length:,} tokens in a row, but the model has learned positions for {config.max_length:,}; give shorter "
            "texts, windows or sequences"
        )


def without_experts(config: DecoderConfig, what: str) -> None:
    """Refuse a decoder with mixtures of experts.

    Raises:
        UsageError: If it has some; `what` is what they cannot have done to them.
    """
    if config.experts is not None:
        raise UsageError(f"{what} of {config.architecture} models is not supported: their MLPs are mixtures of experts")


def language_only(config: DecoderConfig, what: str) -> None:
    """Refuse an image encoder.

    Args:
        config: Of the model.
        what: What language models alone can do, the subject of the message.

    Raises:
        UsageError: If the model is one.
    """
    if not config.causal:
        raise UsageError(f"{what} needs a language model, and {config.architecture} is an image encoder")
