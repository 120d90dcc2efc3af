"""StarCoder 2: layer norms and blocks with biases, and MLPs without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.reading import windows
from ngc_jax.models.families.record import PRE_NORMS, PROJECTIONS, Family

_ATTENTION = {module: name for module, name in PROJECTIONS.items() if module.startswith("attn")}


def _starcoder2(hf: Mapping[str, Any]) -> dict[str, Any]:
    has_window = hf.get("sliding_window") is not None
    return {
        "windows": windows(hf, (has_window,) * hf["num_hidden_layers"]),
        "gated_mlp": False,
        "norm": "layer",
        "norm_bias": True,
    }


STARCODER2 = Family(
    "starcoder2",
    "Starcoder2Config",
    "Starcoder2ForCausalLM",
    features=_starcoder2,
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    biases=lambda hf: (bool(hf.get("use_bias")),) * 3,
    modules=_ATTENTION | PRE_NORMS | {"mlp.u": "mlp.c_fc", "mlp.d": "mlp.c_proj"},
    eps="norm_epsilon",
    differs="layer norms and blocks with biases; MLPs without a gate; a sliding window where set",
)
