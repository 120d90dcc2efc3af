"""EXAONE 4: norms after attention and MLP only; beside sliding layers, full ones have no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.models.families.reading import all_but_every, layer_types, number, rope, windows
from ngc_jax.models.families.record import (
    POST_NORMS,
    PROJECTIONS,
    QK_NORMS,
    Family,
    Gguf,
    GgufKeys,
    only_in_hf,
)

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig


def _exaone4(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers, hybrid = hf["num_hidden_layers"], hf.get("sliding_window") is not None
    sliding = layer_types(hf, layers)
    if sliding is None and hybrid:
        pattern = hf.get("sliding_window_pattern")
        period = len(pattern) if isinstance(pattern, str) and pattern else number(hf, "sliding_window_pattern", int, 4)
        sliding = all_but_every(period, layers)
    found = windows(hf, sliding or (False,) * layers)
    own = rope(hf)
    ropes = tuple(None if hybrid and window is None else own for window in found)
    return {"windows": found, "ropes": ropes, "pre_norms": False, "post_norms": True, "qk_norm": "head"}


def _settings(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    if keys.get("attention.sliding_window"):
        raise keys.error("attention.sliding_window", "is set, which is not supported")
    return {"hidden_act": "silu", "sliding_window": None}


def _metadata(config: DecoderConfig) -> dict[str, Any]:
    only_in_hf(config, sliding_windows=any(config.windows))
    return {}


EXAONE4 = Family(
    "exaone4",
    "Exaone4Config",
    "Exaone4ForCausalLM",
    features=_exaone4,
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    },
    modules=PROJECTIONS | POST_NORMS | QK_NORMS,
    gguf=Gguf("exaone4", _settings, _metadata),
    differs="norms after attention and MLP only; norms of heads; full layers without rope where others have windows",
)
