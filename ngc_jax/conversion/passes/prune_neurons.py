"""The pass that prunes hidden neurons of MLPs; the algorithm is in `ngc_jax.conversion.pruning`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.widths import Pruning, plan_pruning


@register_pass()
@dataclasses.dataclass(frozen=True)
class PruneNeurons(Pass):
    """Prune the hidden neurons of MLPs that the others reconstruct best (Nystrom), before blocks are factorised.

    All MLPs of the result have the same smaller width. Pruned parameters count as dense ones that are not stored.

    Attributes:
        keep_neurons: Share of hidden neurons that every MLP keeps, above 0 and at most 1.
        flexible: Whether the share is a default: all neurons are kept where the topology leaves MLPs out, fewer where
            the smallest ranks need the room. Not an option: a share that the user gives is exact.

    Example:
        >>> from ngc_jax import convert, prune_neurons
        >>> smaller = convert(model, prune_neurons(0.8), text, keep=0.9, window=32)
        >>> model.config.mlp_dim, smaller.config.mlp_dim
        (40, 32)
    """

    name: ClassVar[str] = "prune_neurons"
    keep_neurons: float
    flexible: bool = dataclasses.field(default=False, metadata={"option": False})

    def __post_init__(self) -> None:
        if not 0 < self.keep_neurons <= 1:
            raise UsageError(
                f"keep-neurons {self.keep_neurons:g} is outside (0, 1]; 0.8 keeps 80 % of the hidden neurons"
            )

    @property
    def is_off(self) -> bool:
        """Whether all neurons are kept."""
        return self.keep_neurons == 1

    def with_options(self, options: Mapping[str, Any]) -> PruneNeurons:
        """A share that the user gives is exact."""
        return PruneNeurons(options["keep_neurons"])

    def check(self, chain: Chain) -> None:
        """Raises UsageError where inputs are not measured, or ranks are given for the dense model's blocks."""
        factorise = chain.find(Factorise)
        if factorise is None or self.is_off:
            return
        if not factorise.definition.measures.anything:
            raise UsageError(f"method {chain.method} measures no inputs; leave out keep-neurons")
        if factorise.rank is not None:
            raise UsageError("a fixed rank refers to the dense model's blocks; leave out rank or keep-neurons")

    def is_default_in(self, chain: Chain) -> bool:
        """Not where states are fitted by gradient steps."""
        factorise = chain.find(Factorise)
        return super().is_default_in(chain) and (factorise is None or factorise.is_bilinear)

    def plan(self, config: DecoderConfig, keep: float, chain: Chain) -> tuple[DecoderConfig, float]:
        """The architecture with pruned MLPs."""
        planned = self.pruning(config, keep, chain)
        return planned.config, planned.keep

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """Inputs, and G itself of u and g."""
        return Needs(inputs=True, whole=True) if self.pruning(config, keep, chain).removed else Needs()

    def apply(self, state: ConversionState) -> ConversionState:
        """Prune layer by layer, as the statistics are read."""
        planned = self.pruning(state.dense.config, state.keep, state.chain)
        if not planned.removed:
            return state
        from ngc_jax.conversion.pruning import prune_layers

        factorise = state.chain.find(Factorise)
        pruned = prune_layers(
            state.dense,
            planned.config,
            state.statistics,
            shrinkage=0.0 if factorise is None else factorise.shrinkage,
            at_once=(os.cpu_count() or 1) if state.held else 1,
            donate=state.donate and not state.held,
        )
        return dataclasses.replace(
            state,
            dense=pruned.model,
            original=state.dense,
            kept=pruned.kept,
            statistics=pruned.statistics,
            keep=planned.keep,
            removed=state.removed + planned.removed,
        )

    def pruning(self, config: DecoderConfig, keep: float, chain: Chain) -> Pruning:
        """The width that MLPs keep, and what is left for the passes after it."""
        if self.is_off:
            return Pruning(config, keep)
        factorise = chain.find(Factorise)
        topology = Factorise.topology if factorise is None else factorise.topology
        rule = None if factorise is None else factorise.rule(keep, chain.method)
        return plan_pruning(config, topology, rule, self.keep_neurons, flexible=self.flexible)


prune_neurons = PruneNeurons
