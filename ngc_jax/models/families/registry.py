"""All families by their `model_type`."""

from __future__ import annotations

from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.cohere import COHERE, COHERE2
from ngc_jax.models.families.encoders import is_encoder
from ngc_jax.models.families.exaone import EXAONE4
from ngc_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from ngc_jax.models.families.glm import GLM, GLM4
from ngc_jax.models.families.gpt2 import GPT2
from ngc_jax.models.families.granite import GRANITE
from ngc_jax.models.families.llama import LLAMA
from ngc_jax.models.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from ngc_jax.models.families.mixtures import GRANITEMOE, MIXTRAL, OLMOE, QWEN3_MOE
from ngc_jax.models.families.nemotron import NEMOTRON
from ngc_jax.models.families.neox import GPT_NEOX
from ngc_jax.models.families.olmo import OLMO2, OLMO3
from ngc_jax.models.families.phi import PHI3
from ngc_jax.models.families.qwen import QWEN2, QWEN3
from ngc_jax.models.families.record import Family
from ngc_jax.models.families.relatives import RELATIVES
from ngc_jax.models.families.smollm import SMOLLM3
from ngc_jax.models.families.stablelm import STABLELM
from ngc_jax.models.families.starcoder import STARCODER2

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL,
        MINISTRAL3,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        GRANITE,
        SMOLLM3,
        OLMO2,
        OLMO3,
        EXAONE4,
        GLM,
        GLM4,
        COHERE,
        COHERE2,
        STABLELM,
        STARCODER2,
        NEMOTRON,
        GPT_NEOX,
        GPT2,
        QWEN3_MOE,
        MIXTRAL,
        OLMOE,
        GRANITEMOE,
    )
}
"""In the order of documentation."""


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
        UsageError: If it is not supported.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if is_encoder({"model_type": model_type}):
        raise UsageError(
            f"{model_type} is an image encoder, which this does not take; convert it with --images, or load it with "
            "load_model"
        )
    unsupported = f"architecture {model_type!r} (model_type in config.json) is not supported; "
    if isinstance(model_type, str) and model_type in RELATIVES:
        relative, difference = RELATIVES[model_type]
        raise UsageError(f"{unsupported}its nearest supported relative is {relative}: {difference}")
    raise UsageError(f"{unsupported}expected one of {', '.join(FAMILIES)}")


def register(family: Family) -> Family:
    """Add a family to those of the package, for this process.

    Returns:
        The family.

    Raises:
        UsageError: If its `model_type` has one already.

    Example:
        >>> register(FAMILIES["llama"])
        Traceback (most recent call last):
        ngc_jax.errors.UsageError: model_type 'llama' has a family; choose another name
    """
    if family.model_type in FAMILIES:
        raise UsageError(f"model_type {family.model_type!r} has a family; choose another name")
    FAMILIES[family.model_type] = family
    return family


def gguf_families() -> dict[str, Family]:
    """The first family of every architecture of GGUF files."""
    found: dict[str, Family] = {}
    for family in FAMILIES.values():
        if family.gguf is not None:
            found.setdefault(family.gguf.name, family)
    return found
