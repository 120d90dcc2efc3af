"""The pass that trains a converted model on its calibration text; the loop is in `ngc_jax.conversion.refining`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.state import ConversionState
from ngc_jax.errors import UsageError


@register_pass(after="propagate_errors")
@dataclasses.dataclass(frozen=True)
class Refine(Pass):
    """Train the converted blocks by gradient, to predict what the dense model predicts, once over the calibration text.

    The dense model stays in memory, with gradients and Adam's two moments of all trained parameters. For more than a
    pass over the text, or on several hosts, distil the converted model instead.

    Attributes:
        refine_tokens: Number of tokens, from the end of the calibration text; 0 trains nothing, and more than the
            text has are all.
        refine_rate: Adam's learning rate at the start; it falls to a tenth of it.

    Raises:
        UsageError: If a number is out of range.

    Example:
        >>> from ngc_jax import Recipe
        >>> print(*(one.name for one in Recipe("svd_llm", refine_tokens=32_768).chain))
        factorise refine
    """

    name: ClassVar[str] = "refine"
    reads_text: ClassVar[bool] = True
    keeps_dense: ClassVar[bool] = True
    refine_tokens: int = 32_768
    refine_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.refine_tokens < 0:
            raise UsageError(f"refine-tokens {self.refine_tokens} is below 0; 0 trains nothing")
        if not 0 < self.refine_rate < 1:
            raise UsageError(f"refine-rate {self.refine_rate:g} is outside (0, 1); 1e-4 suits Adam on most models")

    @property
    def is_off(self) -> bool:
        """Whether nothing is trained."""
        return self.refine_tokens == 0

    def check(self, chain: Chain) -> None:
        """Raises UsageError unless blocks are converted before."""
        if self.is_off:
            return
        factorise = chain.find(Factorise)
        if factorise is None or chain.passes.index(self) < chain.passes.index(factorise):
            raise UsageError("refine trains a converted model; add factorise before it, or leave out refine-tokens")

    def apply(self, state: ConversionState) -> ConversionState:
        """Train the compact model."""
        if self.is_off:
            return state
        from ngc_jax.conversion.refining import refined

        return dataclasses.replace(state, compact=refined(state, self.refine_tokens, self.refine_rate))


refine = Refine
