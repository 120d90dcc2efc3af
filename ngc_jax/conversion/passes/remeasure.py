"""The pass that measures gradients again on the converted model; see `ngc_jax.conversion.remeasuring`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig


@register_pass(after="factorise")
@dataclasses.dataclass(frozen=True)
class Remeasure(Pass):
    """Measure the gradients again on the converted model, mix them into the statistics, and factorise again.

    Attributes:
        rounds: How often gradients are measured again on the converted model, which is then factorised again. 0 takes
            less time and holds the statistics of one layer at a time.
        sensitivities: In each round, also correct the expected loss of each layer and role by the slope of the loss
            measured there.

    Example:
        >>> from ngc_jax import chain, factorise, remeasure
        >>> print(*(one.name for one in chain(factorise("ngc"), remeasure(rounds=2))))
        factorise remeasure
    """

    name: ClassVar[str] = "remeasure"
    rounds: int = 1
    sensitivities: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise UsageError(f"rounds {self.rounds} is below 0; 0 measures the dense model only")

    @property
    def is_off(self) -> bool:
        """Whether there is no round."""
        return self.rounds == 0

    def with_options(self, options: Mapping[str, Any]) -> Remeasure:
        """Sensitivities are corrected unless the user disables it.

        Raises:
            UsageError: If they are to be corrected without a round.
        """
        made = dataclasses.replace(self, **options)
        if options.get("sensitivities") and not made.rounds:
            raise UsageError("sensitivities are measured with the gradients; add a round or leave them out")
        return made

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Remeasure:
        """No round, unless the user asks for one."""
        return cls(rounds=0).with_options(options)

    def check(self, chain: Chain) -> None:
        """Raises UsageError where no gradients are measured, or nothing is factorised before."""
        if self.is_off:
            return
        factorise = chain.find(Factorise)
        if factorise is None or chain.passes.index(self) < chain.passes.index(factorise):
            raise UsageError("gradients are measured on a converted model; add factorise before remeasure")
        if factorise.is_dense:
            raise UsageError("form dense prunes once; leave out rounds")
        if factorise.definition.measures.gradients is None:
            raise UsageError(f"method {chain.method} uses no gradients; leave out rounds")
        if not factorise.is_bilinear:
            raise UsageError(f"kernel {factorise.kernel!r} is fitted once; leave out rounds")

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """The statistics of all layers at once."""
        return Needs(held=not self.is_off)

    def apply(self, state: ConversionState) -> ConversionState:
        """Every round replaces the statistics and the compact model."""
        from ngc_jax.conversion.remeasuring import remeasured

        factorise = state.chain.find(Factorise)
        assert factorise is not None
        last = state.last
        for left in reversed(range(self.rounds)):
            # In the list itself, so that the previous gradients are freed.
            held = state.statistics
            assert isinstance(held, list)
            held[:] = remeasured(state, factorise, sensitivities=self.sensitivities)
            state = factorise.apply(dataclasses.replace(state, last=last and not left, fits=None))
        return dataclasses.replace(state, last=last)


remeasure = Remeasure
