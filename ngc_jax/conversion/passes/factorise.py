"""The pass that replaces weight matrices by neuron states of a lower rank."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.factorisations import FACTORISATIONS, Factorisation
from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import Plan
from ngc_jax.groups.topology import parse
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.candidates import AUTO, all_candidates, candidate_cells, planned_blocks
from ngc_jax.planning.ranks import Allocation, RankRule, given_ranks

if TYPE_CHECKING:
    from ngc_jax.conversion.fitted import FittedGroups
    from ngc_jax.conversion.statistics import Statistics

KernelName = Literal["bilinear", "riemannian", "lifted"]
Form = Literal["grouped", "dense"]


@register_pass(after="prune_neurons")
@dataclasses.dataclass(frozen=True)
class Factorise(Pass):
    """Replace the weight matrices of each group by shared input states and output states of each member.

    In the form `dense` no matrix is replaced: the pass says what is measured, and which blocks the keep ratio counts.

    Attributes:
        factorisation: How states are found, one of `FACTORISATIONS`.
        form: Where the result can run: grouped, in ngc-jax; or dense, in every program that loads the architecture,
            because only hidden neurons of MLPs are pruned, the same number in every layer.
        topology: Which blocks share a latent space, for example qkv-o-ug-d, or a named family; auto chooses the
            topology by the expected loss.
        rank: Give every group this rank, or "full", instead of a keep ratio.
        allocation: How ranks are chosen: uniform, neurons (prune hidden neurons of MLPs only), svd_llm_v2, or loss (one
            Lagrange multiplier over all groups).
        gauge: Fix the gauge: rank r stores r (outputs + inputs - r) numbers in place of r (outputs + inputs).
        rank_multiple: With allocation loss: ranks are multiples of this, for example 8 or 128 for a TPU's tiles.
        cache_ratio: Largest share of the key-value cache's numbers per token to keep, above 0 and at most 1: limits the
            ranks of groups that have k or v. Without a topology, k and v of a layer then share one latent space.
        gradients: Which part of the gradients' second moments is measured: full, or diagonal, which needs far less
            memory.
        shrinkage: How far the inputs' second moments are shrunk towards their diagonals, 0 to 1. A higher value, such
            as 0.3, gives a model that generalises better to text unlike the calibration text.
        kernel: How two states make a weight: bilinear; or riemannian or lifted, whose states are fitted by gradient
            steps, group by group, which takes much longer.
        metric_rank: For riemannian: rank of the metric's low-rank part, added to its diagonal.
        lift: For lifted: number of lifted features, above every group's rank.
        fit_steps: For riemannian and lifted: gradient steps for each group.

    Raises:
        UsageError: If a value is out of range or options contradict each other.

    Example:
        >>> from ngc_jax import chain, convert, factorise
        >>> compact = convert(model, chain(factorise("svd", topology="qkv-o-ug-d")), keep=0.6)
        >>> print(*(group.name for group in compact.plan.groups[:2]))
        L0-qkv L0-o
    """

    name: ClassVar[str] = "factorise"
    factorisation: str = dataclasses.field(default="ngc", metadata={"option": False})
    form: Form = "grouped"
    topology: str = "q-k-v-o-u-g-d"
    rank: int | Literal["full"] | None = None
    allocation: Allocation = "uniform"
    gauge: bool = False
    rank_multiple: int = 1
    cache_ratio: float | None = None
    gradients: Literal["full", "diagonal"] = "full"
    shrinkage: float = 0.0
    kernel: KernelName = "bilinear"
    metric_rank: int = 0
    lift: int = 0
    fit_steps: int = 2000

    def __post_init__(self) -> None:
        if self.factorisation not in FACTORISATIONS:
            raise UsageError(
                f"unknown factorisation {self.factorisation!r}; expected one of {', '.join(FACTORISATIONS)}"
            )
        if self.rank is not None and self.rank != "full" and self.rank < 1:
            raise UsageError(f"rank {self.rank} is too small; expected at least 1, or full")
        if self.rank is not None and self.allocation != "uniform":
            raise UsageError(f"a fixed rank leaves nothing to allocate; leave out rank or allocation {self.allocation}")
        if self.rank_multiple < 1:
            raise UsageError(f"rank multiple {self.rank_multiple} is too small; expected at least 1")
        if self.rank_multiple > 1 and self.allocation != "loss":
            raise UsageError("a rank multiple needs allocation 'loss'; leave it out or change the allocation")
        self._check_cache_ratio()
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"shrinkage {self.shrinkage:g} is outside [0, 1]; 0 takes the second moments as measured")
        if not self.is_bilinear and self.gauge:
            raise UsageError(f"kernel {self.kernel!r} has no gauge to fix; leave out gauge")
        factorises = self.rank is not None or self.allocation != "uniform" or self.gauge or not self.is_bilinear
        if self.is_dense and factorises:
            raise UsageError("form dense factorises nothing; leave it out, or rank, allocation, gauge and kernel")
        if self.fit_steps < 0:
            raise UsageError(f"fit steps {self.fit_steps} is below 0; 0 keeps the initial states")
        self.interaction  # noqa: B018  (its options are checked when it is made)
        if self.topology != AUTO:
            parse(self.topology)
        elif self.allocation != "loss":
            raise UsageError("topology auto is chosen by the expected loss; it needs allocation 'loss'")

    def _check_cache_ratio(self) -> None:
        if self.cache_ratio is None:
            return
        if not 0 < self.cache_ratio <= 1:
            raise UsageError(f"cache ratio {self.cache_ratio:g} is outside (0, 1]; 0.5 keeps half of the cache")
        if self.rank is not None:
            raise UsageError("a fixed rank leaves nothing for a cache ratio to choose; leave out one of them")
        if self.topology == AUTO:
            raise UsageError("a cache ratio needs a topology; leave out topology auto, or give q-kv-o-u-g-d")
        if self.kernel == "lifted":
            raise UsageError("the signals of kernel 'lifted' are wider than its ranks; leave out the cache ratio")

    def with_options(self, options: Mapping[str, Any]) -> Factorise:
        """The method's allocation and gauge are dropped where the user's options exclude them."""
        own: dict[str, Any] = {}
        if options.get("cache_ratio") is not None and self.topology == Factorise.topology:
            own["topology"] = "q-kv-o-u-g-d"
        if options.get("rank") is not None:
            own["allocation"] = "uniform"
        if options.get("kernel", self.kernel) != "bilinear":
            own["gauge"] = False
        return dataclasses.replace(self, **{**own, **options})

    @property
    def definition(self) -> Factorisation:
        """The factorisation function and its needs."""
        return FACTORISATIONS[self.factorisation]

    @property
    def is_dense(self) -> bool:
        """Whether every block remains a plain matrix."""
        return self.form == "dense"

    @property
    def is_bilinear(self) -> bool:
        """Whether the states have a closed form."""
        return self.kernel == "bilinear"

    @property
    def interaction(self) -> Kernel:
        """The kernel of all groups."""
        return Kernel(self.kernel, metric_rank=self.metric_rank, lift=self.lift)

    def rule(self, keep: float, method: str = "custom") -> RankRule:
        """How ranks are chosen at a keep ratio; errors name the method."""
        return RankRule(
            keep,
            self.allocation,
            self.gauge,
            self.rank,
            self.rank_multiple,
            self.interaction,
            self.definition.rounding,
            method,
            self.is_dense,
            self.cache_ratio,
        )

    def check(self, chain: Chain) -> None:
        """Raises UsageError for a second factorisation."""
        if sum(isinstance(one, Factorise) for one in chain.passes) > 1:
            raise UsageError("a chain factorises once; leave out the other factorise")
        if self.is_dense and not any(one.name == "prune_neurons" for one in chain.passes):
            raise UsageError("form dense only prunes hidden neurons; add prune_neurons before factorise")

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """The statistics that the factorisation needs."""
        measures = self.definition.measures
        return measures if measures.gradients is None else dataclasses.replace(measures, gradients=self.gradients)

    def apply(self, state: ConversionState) -> ConversionState:
        """Fit every group as soon as its members are measured, choose ranks, and build the compact model."""
        from ngc_jax.conversion.fitted import build_compact, fit_groups
        from ngc_jax.conversion.fitting import shrunk_in_place

        if self.is_dense:
            return self._left_dense(state)
        rule = self.rule(state.keep, state.chain.method)
        groups = all_candidates(candidate_cells(state.dense.config, self.topology))
        ranks = given_ranks(rule, groups) or None
        factorise, statistics = self, state.statistics
        if isinstance(statistics, list):
            stream = iter(statistics)
        elif state.held:
            held: list[dict[str, Statistics]] = []
            stream, statistics = _kept(statistics, held), held
        elif state.fits is None:
            # No longer needed: shrunk in place, which saves a copy of the largest arrays.
            stream = map(functools.partial(shrunk_in_place, shrinkage=self.shrinkage), statistics)
            factorise = dataclasses.replace(self, shrinkage=0.0)
        else:
            stream = iter(statistics)
        donate = state.donate and state.last

        def fit(directory: str, ranks: Mapping[str, int] | None) -> FittedGroups:
            return fit_groups(state.dense, factorise, stream, directory, ranks=ranks, progress=state.progress)

        if state.fits is not None and state.original is None:
            fitted = state.fits.get(self._fit_key(), lambda directory: fit(directory, None))
            for _ in stream:  # not read where the fit was found; later passes need the statistics all the same
                pass
            compact = build_compact(state.dense, self, rule, fitted, donate=donate, progress=state.progress)
        else:
            with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
                fitted = fit(directory, ranks)
                compact = build_compact(state.dense, factorise, rule, fitted, donate=donate, progress=state.progress)
        return dataclasses.replace(state, compact=compact, statistics=statistics)

    def _left_dense(self, state: ConversionState) -> ConversionState:
        """The model as pruned: its layers are pruned as statistics are read, now or by the pass that refits them."""
        statistics = state.statistics
        if state.held:
            statistics = list(statistics)
        elif not any(one.name == "propagate_errors" for one in state.chain):
            for _ in statistics:
                pass
        blocks = tuple(planned_blocks(state.dense.config, self.topology).values())
        compact = dataclasses.replace(state.dense, plan=Plan((), blocks))
        return dataclasses.replace(state, compact=compact, statistics=statistics)

    def _fit_key(self) -> tuple[Any, ...]:
        """Everything that full-rank fits depend on; they serve any allocation, gauge and keep ratio."""
        kind = self.definition.function, self.definition.measures, self.topology, self.gradients
        return *kind, self.shrinkage, self.is_bilinear


def _kept(
    stream: Iterable[dict[str, Statistics]], held: list[dict[str, Statistics]]
) -> Iterator[dict[str, Statistics]]:
    for statistics in stream:
        held.append(statistics)
        yield statistics


factorise = Factorise
