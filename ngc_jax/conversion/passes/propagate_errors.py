"""The pass that propagates errors; the algorithms are in `ngc_jax.conversion.propagation` and `dense_refit`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.candidates import may_span_layers


@register_pass(after="remeasure")
@dataclasses.dataclass(frozen=True)
class PropagateErrors(Pass):
    """Refit each layer, from the first to the last, on the inputs that the converted layers below it produce.

    Attributes:
        propagation: How far each layer's targets and inputs are moved from the dense model's (0) to those of the
            converted layers below it (1).

    Example:
        >>> from ngc_jax import chain, factorise, propagate_errors
        >>> chain(factorise("svd_llm"), propagate_errors(0.3)).options()["propagation"]
        0.3
    """

    name: ClassVar[str] = "propagate_errors"
    propagation: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.propagation <= 1:
            raise UsageError(
                f"propagation {self.propagation:g} is outside [0, 1]; 0 fits every layer to the dense model's inputs"
            )

    @property
    def is_off(self) -> bool:
        """Whether nothing is propagated."""
        return self.propagation == 0

    def check(self, chain: Chain) -> None:
        """Raises UsageError where groups may span layers, inputs are not measured, or states have no closed form."""
        if self.is_off:
            return
        factorise = chain.find(Factorise)
        if factorise is None or chain.passes.index(self) < chain.passes.index(factorise):
            raise UsageError("errors are propagated in a converted model; add factorise before propagate_errors")
        if not factorise.definition.measures.anything:
            raise UsageError(f"method {chain.method} measures no inputs; leave out propagation")
        if may_span_layers(factorise.topology):
            raise UsageError(
                f"errors are propagated in groups within layers only, and groups of topology {factorise.topology} may "
                "span layers; leave out propagation"
            )
        if not factorise.is_bilinear:
            raise UsageError(f"kernel {factorise.kernel!r} is fitted once; leave out propagation")

    def is_default_in(self, chain: Chain) -> bool:
        """Not at full rank, where there are no errors."""
        factorise = chain.find(Factorise)
        return super().is_default_in(chain) and (factorise is None or factorise.rank != "full")

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """The statistics of all layers at once, unless every layer is pruned and refitted in turn."""
        factorise = chain.find(Factorise)
        if factorise is not None and factorise.is_dense:
            return Needs()
        same = calibration.propagation_tokens == calibration.gradient_tokens
        return Needs() if self.is_off else Needs(held=True, first=same)

    def apply(self, state: ConversionState) -> ConversionState:
        """Refit the groups at their ranks, or in form dense the blocks that write to the residual stream."""
        if self.is_off:
            return state
        factorise = state.chain.find(Factorise)
        assert factorise is not None
        if factorise.is_dense:
            from ngc_jax.conversion.dense_refit import refit_dense

            return dataclasses.replace(state, compact=refit_dense(state, self.propagation, factorise.shrinkage))
        from ngc_jax.conversion.propagation import propagate

        return dataclasses.replace(state, compact=propagate(state, factorise, self.propagation))


propagate_errors = PropagateErrors
