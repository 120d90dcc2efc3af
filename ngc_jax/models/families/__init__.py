"""Families of models: one record each, in a small module per family or close kin; see `record.Family`.

Everything that the rest of the package knows of a family is in its record. The decoder knows features only.
"""

from ngc_jax.models.families.multimodal import OTHER_PARTS, text_config
from ngc_jax.models.families.record import Family, Gguf, GgufKeys
from ngc_jax.models.families.registry import FAMILIES, family_of, gguf_families, register
from ngc_jax.models.families.table import support_table

__all__ = [
    "FAMILIES",
    "OTHER_PARTS",
    "Family",
    "Gguf",
    "GgufKeys",
    "family_of",
    "gguf_families",
    "register",
    "support_table",
    "text_config",
]
