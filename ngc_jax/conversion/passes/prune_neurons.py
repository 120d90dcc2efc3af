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
from ngc_jax.planning.widths import Pruning, plan_dense, plan_pruning


@register_pass()
@dataclasses.dataclass(frozen=True)
class PruneNeurons(Pass):
    """Prune the hidden neurons of MLPs that the others reconstruct best (Nystrom), before blocks are factorised.

    All MLPs of the result have the same smaller width. Pruned parameters count as dense ones that are not stored.

    Attributes:
        keep_neurons: Share of hidden neurons that every MLP keeps, above 0 and at most 1. In the form dense the keep
            ratio decides instead.
        neuron_multiple: With form dense: the number of hidden neurons is a multiple of this; 32 suits GGUF's quantised
            types, 128 a TPU.
        flexible: Whether the share is a default: all neurons are kept where the topology leaves MLPs out, fewer where
            the smallest ranks need the room. Not an option: a share that the user gives is exact.

    Example:
        >>> from ngc_jax import convert, prune_neurons
        >>> smaller = convert(model, prune_neurons(0.8), text, keep=0.9, window=32)
        >>> model.config.mlp_dim, smaller.config.mlp_dim
        (40, 32)
    """

    name: ClassVar[str] = "prune_neurons"
    keep_neurons: float | None = None
    neuron_multiple: int | None = None
    flexible: bool = dataclasses.field(default=False, metadata={"option": False})

    def __post_init__(self) -> None:
        if self.keep_neurons is not None and not 0 < self.keep_neurons <= 1:
            raise UsageError(
                f"keep-neurons {self.keep_neurons:g} is outside (0, 1]; 0.8 keeps 80 % of the hidden neurons"
            )
        if self.neuron_multiple is not None and self.neuron_multiple < 1:
            raise UsageError(f"neuron multiple {self.neuron_multiple} is too small; expected at least 1")

    @property
    def is_off(self) -> bool:
        """Whether all neurons are kept."""
        return self.keep_neurons == 1

    def with_options(self, options: Mapping[str, Any]) -> PruneNeurons:
        """A share that the user gives is exact."""
        return dataclasses.replace(self, **options, flexible=self.flexible and "keep_neurons" not in options)

    def check(self, chain: Chain) -> None:
        """Raises UsageError where inputs are not measured, or the number of neurons has no or two causes."""
        factorise = chain.find(Factorise)
        dense = factorise is None or factorise.is_dense
        if self.neuron_multiple is not None and not (dense and self.keep_neurons is None):
            raise UsageError("a neuron multiple is for form dense; leave it out, or choose form dense")
        if factorise is None or self.is_off:
            return
        if factorise.is_dense and self.keep_neurons is not None:
            raise UsageError("in form dense the keep ratio says how many neurons are kept; leave out keep-neurons")
        if self.keep_neurons is None and not factorise.is_dense:
            raise UsageError("how many hidden neurons are pruned is not said; give keep-neurons, or choose form dense")
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
        """Inputs, and G itself of u and g if they are factorised afterwards."""
        factorise = chain.find(Factorise)
        whole = factorise is not None and not factorise.is_dense
        return Needs(inputs=True, whole=whole) if self.pruning(config, keep, chain).removed else Needs()

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
            donate=state.donate and not state.held and (factorise is None or not factorise.is_dense),
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
        if self.keep_neurons is None:
            return plan_dense(config, topology, keep, self.neuron_multiple)
        rule = None if factorise is None else factorise.rule(keep, chain.method)
        return plan_pruning(config, topology, rule, self.keep_neurons, flexible=self.flexible)


prune_neurons = PruneNeurons
