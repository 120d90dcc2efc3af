"""What a conversion does, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ngc_jax.convert.methods import METHODS, Method
from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.topology import parse, spans_layers

Allocation = Literal["uniform", "neurons", "svd_llm_v2", "loss"]
GradientGeometry = Literal["full", "diagonal"]
KernelName = Literal["bilinear", "riemannian", "lifted"]
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its levers; what is None is the method's own.

    Attributes:
        method: One of `METHODS`.
        topology: In the topology language, a family's name, or `auto`: the sharing that pays, chosen with the ranks.
        keep: Keep ratio of the planned blocks.
        rank: Every group's rank, or "full", instead of a keep ratio.
        allocation: How ranks are found: `uniform` gives every group the same keep ratio, `neurons` leaves
            MLPs dense but for the hidden neurons that go and all others the same keep ratio, `svd_llm_v2` shares each
            role's budget out over its layers by their losses, `loss` minimises the expected loss over all groups.
        gauge: Whether pivots are chosen, so that rank r stores r (M + I - r) in place of r (M + I).
        rank_multiple: `loss` only: ranks are multiples of this, or the block stays dense.
        gradients: How much of the output gradients' second moments is measured, for methods that need them.
        rounds: How often the gradients are measured again, on the converted model, and mixed in before it is converted
            anew.
        sensitivities: Whether such a round also corrects each layer's and role's expected loss by the slope of the loss
            that it finds; it does if None.
        shrinkage: How far the inputs' second moments are drawn to their diagonals, 0 to 1. Directions that the
            calibration text hardly uses are not free on other text; the further that is, the more shrinkage helps.
        propagation: How far every layer is fitted anew on what the converted layers below it send, 0 to 1; 0 takes no
            time. If None, nothing at full rank, with another kernel, or where groups may span layers.
        width: The share of hidden neurons that every MLP keeps, above 0 and at most 1; the others are told by them
            (`narrow`) and count as dense parameters that are not stored. If None, all, or what the method makes of the
            keep ratio where it narrows MLPs.
        kernel: How two states make a weight. Others than `bilinear` have no closed form and no gauge to fix: every
            group is fitted by gradient steps from the bilinear solution, at the rank that stores no more than that.
        metric_rank: riemannian: rank of the metric's part beside the diagonal.
        lift: lifted: number of lifted features, above every group's rank.
        fit_steps: Gradient steps of every group.

    Raises:
        UsageError: If a value is out of range or levers contradict each other.
    """

    method: str = "ngc"
    topology: str | None = None
    keep: float = 0.8
    rank: int | Literal["full"] | None = None
    allocation: Allocation | None = None
    gauge: bool | None = None
    rank_multiple: int = 1
    gradients: GradientGeometry = "full"
    rounds: int | None = None
    sensitivities: bool | None = None
    shrinkage: float | None = None
    propagation: float | None = None
    width: float | None = None
    kernel: KernelName = "bilinear"
    metric_rank: int = 0
    lift: int = 0
    fit_steps: int = 2000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep ratio {self.keep:g} is outside (0, 1]; 0.8 keeps 80 % of the parameters")
        if self.rank is not None and self.rank != "full" and self.rank < 1:
            raise UsageError(f"rank {self.rank} is too small; expected at least 1, or full")
        if self.rank is not None and self.allocation not in (None, "uniform"):
            raise UsageError(f"a given rank leaves nothing to allocate; leave out rank or allocation {self.allocation}")
        if self.rank_multiple < 1:
            raise UsageError(f"rank multiple {self.rank_multiple} is too small; expected at least 1")
        if self.rank_multiple > 1 and self.resolved_allocation != "loss":
            raise UsageError("a rank multiple needs allocation 'loss'; leave it out or change the allocation")
        if self.resolved_rounds < 0:
            raise UsageError(f"rounds {self.rounds} is below 0; 0 measures the dense model only")
        if self.resolved_rounds and self.definition.needs != "gradients":
            raise UsageError(f"method {self.method} uses no gradients; leave out rounds")
        if self.sensitivities and not self.resolved_rounds:
            raise UsageError("sensitivities are found when gradients are measured again; add a round or leave them out")
        if not 0 <= self.resolved_shrinkage <= 1:
            raise UsageError(f"shrinkage {self.shrinkage:g} is outside [0, 1]; 0 takes the second moments as measured")
        if self.propagation:
            if not 0 < self.propagation <= 1:
                raise UsageError(
                    f"propagation {self.propagation:g} is outside [0, 1]; 0 fits every layer to the dense model's"
                )
            if self.definition.needs == "nothing":
                raise UsageError(f"method {self.method} looks at no inputs; leave out propagation")
            if self.may_span_layers:
                raise UsageError(
                    f"errors are propagated in groups within layers only, and groups of topology "
                    f"{self.resolved_topology} may span layers; leave out propagation"
                )
        if self.width is not None and not 0 < self.width <= 1:
            raise UsageError(f"width {self.width:g} is outside (0, 1]; 0.8 keeps 80 % of the hidden neurons")
        if self.resolved_width < 1 and self.definition.needs == "nothing":
            raise UsageError(f"method {self.method} looks at no inputs; leave out width")
        if self.resolved_width < 1 and self.rank is not None:
            raise UsageError("a given rank is of the dense model's blocks; leave out rank or width")
        if not self.is_bilinear:
            if self.propagation:
                raise UsageError(f"kernel {self.kernel!r} is fitted once; leave out propagation")
            if self.gauge:
                raise UsageError(f"kernel {self.kernel!r} has no gauge to fix; leave out gauge")
            if self.rounds:
                raise UsageError(f"kernel {self.kernel!r} is fitted once; leave out rounds")
        if self.fit_steps < 0:
            raise UsageError(f"fit steps {self.fit_steps} is below 0; 0 keeps the states that fitting would start from")
        self.interaction  # noqa: B018  (its options are checked when it is made)
        if self.resolved_topology == AUTO:
            if self.resolved_allocation != "loss":
                raise UsageError("topology auto is chosen by the expected loss; it needs allocation 'loss'")
        else:
            parse(self.resolved_topology)

    @property
    def definition(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def reads_text(self) -> bool:
        """Whether anything is measured on a calibration text."""
        return self.definition.needs != "nothing"

    @property
    def is_bilinear(self) -> bool:
        """Whether the states have a closed form."""
        return self.kernel == "bilinear"

    @property
    def may_span_layers(self) -> bool:
        """Whether groups may have members in several layers."""
        return self.resolved_topology == AUTO or spans_layers(parse(self.resolved_topology))

    @property
    def interaction(self) -> Kernel:
        """The kernel of all groups."""
        return Kernel(self.kernel, metric_rank=self.metric_rank, lift=self.lift)

    @property
    def resolved_topology(self) -> str:
        """The topology, or the method's own."""
        return self.topology or self.definition.topology

    @property
    def resolved_allocation(self) -> Allocation:
        """The allocation, or the method's own."""
        if self.rank is not None:
            return "uniform"
        return self.allocation or self.definition.allocation

    @property
    def resolved_gauge(self) -> bool:
        """Whether the gauge is fixed."""
        return (self.definition.gauge and self.is_bilinear) if self.gauge is None else self.gauge

    @property
    def resolved_rounds(self) -> int:
        """How often gradients are measured again."""
        return (self.definition.rounds if self.is_bilinear else 0) if self.rounds is None else self.rounds

    @property
    def resolved_sensitivities(self) -> bool:
        """Whether expected losses are corrected by measured slopes."""
        return self.resolved_rounds > 0 and self.sensitivities is not False

    @property
    def resolved_shrinkage(self) -> float:
        """How far second moments are drawn to their diagonals."""
        return self.definition.shrinkage if self.shrinkage is None else self.shrinkage

    @property
    def resolved_width(self) -> float:
        """The share of hidden neurons that stay."""
        if self.width is not None:
            return self.width
        if self.definition.width is None or not self.is_bilinear or self.rank is not None:
            return 1.0
        return self.definition.width(self.keep)

    @property
    def resolved_propagation(self) -> float:
        """How far layers are fitted anew on what the converted layers below them send."""
        if self.propagation is not None:
            return self.propagation
        fitting = self.is_bilinear and self.rank != "full" and self.definition.propagation > 0
        return self.definition.propagation if fitting and not self.may_span_layers else 0.0
