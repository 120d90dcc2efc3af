"""Phi 3 and 4: fused tensors, heads that are rotated in part, and two sets of rotary factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import number, rope, windows
from ngc_jax.models.families.record import Family, Gguf, GgufKeys, only_in_hf

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

FUSED_QKV: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
}
FUSED_MLP: dict[str, tuple[str, ...]] = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
# Names of the same scaling.
_LONG_ROPE = ("longrope", "su", "yarn")


def _phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    longest = number(hf, "max_position_embeddings", int)
    if isinstance(parameters, Mapping) and parameters.get("rope_type", parameters.get("type")) in _LONG_ROPE:
        parameters, longest = _short_rope(hf, parameters, longest)
        hf = {**hf, "rope_parameters": parameters}
    return {
        "windows": windows(hf, (hf.get("sliding_window") is not None,) * layers),
        "ropes": (rope(hf, share=1.0),) * layers,
        "max_length": longest,
    }


def _short_rope(hf: Mapping[str, Any], scaling: Mapping[str, Any], longest: int) -> tuple[dict[str, Any], int]:
    """The factors for texts of at most the original length, and that length (LongRoPE, arXiv 2402.13753, section 3).

    Longer texts have other factors, for all of their tokens; a cache of keys cannot change them.
    """
    original = number({**hf, **scaling}, "original_max_position_embeddings", int)
    factors = scaling.get("short_factor")
    if not isinstance(factors, list) or not all(isinstance(one, int | float) and one > 0 for one in factors):
        raise UsageError("short_factor of the rope in config.json is no list of positive numbers; download it again")
    factor = number(scaling, "factor", float, longest / original)
    stretch = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    kept = {name: scaling[name] for name in ("rope_theta", "partial_rotary_factor") if name in scaling}
    attention = number(scaling, "attention_factor", float, stretch)
    return {**kept, "rope_type": "explicit", "factors": factors, "attention_factor": attention}, min(longest, original)


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    if keys.get("rope.scaling.attn_factor") is not None:
        raise keys.error("rope.scaling.attn_factor", "is set, but LongRoPE is not read from GGUF files")
    return {"hidden_act": "silu", "sliding_window": keys.get("attention.sliding_window") or None}


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    only_in_hf(config, LongRoPE=any(rope is not None and rope.rope_type == "explicit" for rope in config.ropes))
    return {}


PHI3 = Family(
    "phi3",
    "Phi3Config",
    "Phi3ForCausalLM",
    features=_phi3,
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    fused=FUSED_QKV | FUSED_MLP,
    gguf=Gguf("phi3", _settings, _metadata, partial_rotary=True),
    differs="fused q, k and v, gate and up; partly rotated heads; of LongRoPE, texts up to the original length",
)
