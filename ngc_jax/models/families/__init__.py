"""Families of models: one record each, in a small module per family or close kin; see `record.Family`.

Everything that the rest of the package knows of a family is in its record. The decoder knows features only.
"""

from ngc_jax.models.families.multimodal import OTHER_PARTS, text_config
from ngc_jax.models.families.record import Family, Gguf, GgufKeys
from ngc_jax.models.families.registry import FAMILIES, family_of, gguf_families

__all__ = [
    "FAMILIES",
    "OTHER_PARTS",
    "Family",
    "Gguf",
    "GgufKeys",
    "family_of",
    "gguf_families",
    "text_config",
]
