"""All families by their `model_type`."""

from __future__ import annotations

from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.gemma import GEMMA3
from ngc_jax.models.families.llama import LLAMA, MISTRAL
from ngc_jax.models.families.qwen import QWEN2, QWEN3
from ngc_jax.models.families.record import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA3,
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
    raise UsageError(
        f"architecture {model_type!r} (model_type in config.json) is not supported; "
        f"expected one of {', '.join(FAMILIES)}"
    )


def gguf_families() -> dict[str, Family]:
    """The first family of every architecture of GGUF files."""
    found: dict[str, Family] = {}
    for family in FAMILIES.values():
        if family.gguf is not None:
            found.setdefault(family.gguf.name, family)
    return found
