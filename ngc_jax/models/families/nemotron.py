"""Nemotron: layer norms with offsets of one and biases, MLPs of squared ReLU without a gate, half-rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.models.families.reading import rope
from ngc_jax.models.families.record import PRE_NORMS, PROJECTIONS, Family, all_biases


def _nemotron(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ropes": (rope(hf, share=0.5),) * hf["num_hidden_layers"],
        "gated_mlp": False,
        "norm": "layer",
        "norm_bias": True,
        "unit_offset_norm": True,
    }


NEMOTRON = Family(
    "nemotron",
    "NemotronConfig",
    "NemotronForCausalLM",
    features=_nemotron,
    defaults={"max_position_embeddings": 4096, "hidden_act": "relu2", "norm_eps": 1e-5},
    biases=all_biases,
    modules={module: name for module, name in (PROJECTIONS | PRE_NORMS).items() if module != "mlp.g"},
    eps="norm_eps",
    differs="layer norms with offsets of one and biases; MLPs without a gate; half-rotated heads",
)
