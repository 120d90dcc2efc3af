"""StableLM: layer norms with biases, partly rotated heads, attention and MLP in parallel where config.json says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.reading import rope
from ngc_jax.models.families.record import PRE_NORMS, PROJECTIONS, Family


def _stablelm(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("qk_layernorm"):
        raise UsageError("stablelm models with qk_layernorm, whose heads have norms of their own, are not supported")
    return {
        "ropes": (rope(hf, share=0.25),) * hf["num_hidden_layers"],
        "norm": "layer",
        "norm_bias": True,
        "parallel": bool(hf.get("use_parallel_residual")),
    }


STABLELM = Family(
    "stablelm",
    "StableLmConfig",
    "StableLmForCausalLM",
    features=_stablelm,
    defaults={"max_position_embeddings": 4096, "num_key_value_heads": 32, "layer_norm_eps": 1e-5},
    biases=lambda hf: (bool(hf.get("use_qkv_bias")), False, False),
    modules=PROJECTIONS | PRE_NORMS,
    eps="layer_norm_eps",
    differs="layer norms with biases; quarter-rotated heads; attention and MLP in parallel where enabled",
)
