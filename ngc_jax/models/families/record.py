"""What one family of models is: a record that the rest of the package reads, and that names no other family.

Legend: L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, Protocol

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

# Our modules of a layer -> those of Hugging Face's Llama.
PROJECTIONS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.u": "mlp.up_proj",
    "mlp.g": "mlp.gate_proj",
    "mlp.d": "mlp.down_proj",
}
# The same of mixtures of experts; * stands for an expert's number.
EXPERTS = {
    "mlp.router": "mlp.gate",
    "mlp.u.*": "mlp.experts.*.up_proj",
    "mlp.g.*": "mlp.experts.*.gate_proj",
    "mlp.d.*": "mlp.experts.*.down_proj",
}
# Tensors with the matrices of all experts, one below the other, as transformers 5 holds them in memory.
STACKED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    "mlp.experts.down_proj": ("mlp.experts.*.down_proj",),
}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
PRE_AND_POST_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm", **POST_NORMS}


class GgufKeys(Protocol):
    """The metadata of a GGUF file, by keys without the architecture's name."""

    def get(self, key: str) -> Any:
        """A value; None if it is missing."""

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""

    def error(self, key: str, problem: str) -> Exception:
        """The error to raise for a key."""


@dataclasses.dataclass(frozen=True, eq=False)
class Gguf:
    """How llama.cpp's files describe a family.

    Attributes:
        name: The architecture's name.
        settings: From metadata, the config.json read so far and GGUF's names of the biased blocks to further entries of
            config.json; they may change its type to that of a relative that the file fits.
        metadata: From the decoder's config to the metadata that only this architecture has, without its name before
            the keys. Raises UsageError for what llama.cpp does not compute.
        eps: The key of the norms' epsilon.
        paired_rotary: Rows of q and k take turns between the two rotary halves of a head.
        partial_rotary: Heads may be rotated in part.
        offset_norms: Norm scales include the one that Hugging Face's leave out.
        windows: llama.cpp knows the family's sliding windows.
        wide_heads: The architecture to write where the heads together are not as wide as the residual stream, which
            llama.cpp takes for granted in some architectures; None for the same.
    """

    name: str
    settings: Callable[[GgufKeys, Mapping[str, Any], Set[str]], Mapping[str, Any]]
    metadata: Callable[[DecoderConfig], Mapping[str, Any]] = lambda config: {}
    eps: str = "attention.layer_norm_rms_epsilon"
    paired_rotary: bool = False
    partial_rotary: bool = False
    offset_norms: bool = False
    windows: bool = False
    wide_heads: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family of models, known by the `model_type` of its config.json.

    Attributes:
        model_type: Of config.json.
        config_class: transformers' class of its config.
        model_class: transformers' class of its causal language model.
        features: From config.json to the fields of `DecoderConfig` in which it differs from Llama.
        defaults: What transformers assumes where config.json is silent. Published files rely on it.
        biases: From config.json to whether q, k and v, o, and the MLP have biases.
        modules: Our modules of a layer -> Hugging Face's.
        fused: Hugging Face's modules of a layer that are several of ours, one below the other -> the parts' names in
            `modules`.
        stacked: Tensors of a layer that have some matrices of every expert, expert by expert one below the other -> the
            matrices' names in `modules`. Read, and written where `writes_stacked`.
        writes_stacked: Whether the family's own files have the tensors of `stacked`.
        expert_width: The entry of config.json with the hidden neurons of an expert.
        gguf: How GGUF files describe it; None if we neither read nor write them.
        eps: The entry of the norms' epsilon.
        differs: In what it differs from Llama, for documentation.
    """

    model_type: str
    config_class: str
    model_class: str
    features: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Callable[[Mapping[str, Any]], tuple[bool, bool, bool]] = lambda hf: (False, False, False)
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: PROJECTIONS | PRE_NORMS)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    writes_stacked: bool = False
    expert_width: str = "intermediate_size"
    gguf: Gguf | None = None
    eps: str = "rms_norm_eps"
    differs: str = ""

    def hf_name(self, parameter: str) -> str:
        """Hugging Face's name of a parameter, for example `layers.3.attn.q.kernel`.

        Raises:
            KeyError: If the family has no such parameter.
        """
        if parameter in TOP:
            return TOP[parameter]
        _, layer, rest = parameter.split(".", 2)
        module, leaf = rest.rsplit(".", 1)
        base, _, number = module.rpartition(".")
        if number.isdecimal():
            inner = self.modules[f"{base}.*"].replace("*", number)
            return f"model.layers.{layer}.{inner}.weight"
        return f"model.layers.{layer}.{self.modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


TOP = {"embed.embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
TOP |= {"norm.bias": "model.norm.bias", "unembed.kernel": "lm_head.weight"}


def only_in_hf(config: DecoderConfig, **others: bool) -> None:
    """Refuse to write a model as a GGUF file.

    Args:
        config: The model's.
        others: What llama.cpp does not compute, as words joined by underscores, and whether the model has it.

    Raises:
        UsageError: If it has any of them.
    """
    found = [name.replace("_", " ") for name, has in others.items() if has]
    if found:
        raise UsageError(f"llama.cpp has no {config.architecture} models with {' and '.join(found)}; export it to hf")


def attention_bias(hf: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Biases on q, k, v and o if `attention_bias` says so, and none in the MLP."""
    attention = bool(hf.get("attention_bias", False))
    return attention, attention, False


def all_biases(hf: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Biases by `attention_bias` and `mlp_bias`."""
    attention, _, _ = attention_bias(hf)
    return attention, attention, bool(hf.get("mlp_bias", False))
