"""SmolLM 3: every fourth layer without rotary embedding (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import all_but_every, brief, layer_types, number, rope, windows
from ngc_jax.models.families.record import Family, Gguf, GgufKeys, all_biases, only_in_hf

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

_INTERVAL = 4


def _smollm3(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    rotated = hf.get("no_rope_layers")  # of the layers that have one
    if rotated is None:
        rotated = all_but_every(number(hf, "no_rope_layer_interval", int, _INTERVAL), layers)
    if not isinstance(rotated, list | tuple) or len(rotated) != layers or any(one not in (0, 1) for one in rotated):
        raise UsageError(f"no_rope_layers in config.json is {brief(rotated)}; expected 0 or 1 for each of {layers}")
    sliding: tuple[bool, ...] = (False,) * layers
    if hf.get("use_sliding_window") and hf.get("sliding_window") is not None:
        sliding = layer_types(hf, layers) or tuple(not one for one in rotated)
    own = rope(hf, theta=2_000_000.0)
    return {"windows": windows(hf, sliding), "ropes": tuple(own if one else None for one in rotated)}


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": bool(biased), "mlp_bias": bool(biased)}


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    rotated = tuple(rope is not None for rope in config.ropes)
    only_in_hf(
        config,
        biases=config.qkv_bias or config.mlp_bias,
        sliding_windows=any(config.windows),
        rotary_embeddings_in_other_layers=rotated != all_but_every(_INTERVAL, config.num_layers),
    )
    return {}


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3Config",
    "SmolLM3ForCausalLM",
    features=_smollm3,
    defaults={
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    biases=all_biases,
    gguf=Gguf("smollm3", _settings, _metadata, paired_rotary=True),
    differs="layers without rotary embedding; sliding windows where enabled",
)
