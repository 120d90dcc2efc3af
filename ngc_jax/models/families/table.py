"""The table of supported architectures, from the records."""

from __future__ import annotations

from collections.abc import Mapping

from ngc_jax.models.families.multimodal import MULTIMODAL
from ngc_jax.models.families.registry import FAMILIES


def support_table(errors: Mapping[str, float] | None = None) -> str:
    """One row in Markdown for every family.

    Args:
        errors: The worst difference of logits from transformers', by `model_type`; without a column for it if None.

    Example:
        >>> print(support_table().splitlines()[2])
        | `llama` | `LlamaForCausalLM` | | read and written |
    """
    head = ["`model_type`", "in transformers", "beside Llama's features", "GGUF"]
    rows = [
        [
            f"`{family.model_type}`",
            f"`{family.model_class}`",
            family.differs,
            "" if family.gguf is None else "read and written",
        ]
        for family in FAMILIES.values()
    ]
    rows += [
        [f"`{model.model_type}`", "", f"its text decoder, as `{model.text_type or 'mistral` or `ministral3'}`", ""]
        for model in MULTIMODAL.values()
    ]
    if errors is not None:
        head.append("worst difference of logits")
        rows = [[*row, f"{errors[name]:.0e}" if (name := row[0].strip("`")) in errors else ""] for row in rows]
    return "\n".join(map(_row, [head, ["---"] * len(head), *rows]))


def _row(cells: list[str]) -> str:
    return "| " + " ".join(f"{cell} |" if cell else "|" for cell in cells)
