"""The fitted groups of a conversion, and the compact model that is built from them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ngc_jax.conversion.closed_form import Factors
from ngc_jax.conversion.fitting import assemble, fit_all, shrunk
from ngc_jax.conversion.kernel_fit import fit_kernel
from ngc_jax.conversion.spill import Fitted, Spill
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.files import Closing
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.candidates import Candidate, all_candidates, candidate_cells
from ngc_jax.planning.ranks import RankRule, choose_ranks, given_ranks
from ngc_jax.types import Progress

if TYPE_CHECKING:
    from ngc_jax.conversion.passes.factorise import Factorise


class FittedGroups:
    """All candidate groups of a topology, fitted; `build_compact` builds a model from them at any keep ratio.

    Attributes:
        cells: Alternative groupings of the same blocks.
        groups: The groups of all alternatives.
        spill: Their states.
        statistics: Of the members of groups that must be fitted again once their rank is known.
    """

    def __init__(self, model: LanguageModel, topology: str, spill: Spill) -> None:
        self.cells = candidate_cells(model.config, topology)
        self.groups = all_candidates(self.cells)
        self.spill = spill
        self.statistics: dict[str, list[Statistics]] = {}


def fit_groups(
    model: LanguageModel,
    factorise: Factorise,
    stream: Iterable[Mapping[str, Statistics]],
    directory: str | Path,
    *,
    ranks: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> FittedGroups:
    """Fit every group of a topology as soon as the last of its members has been measured.

    A group's statistics are freed then, so that a topology within layers holds the statistics of one layer at a time;
    the states are kept on disk. Where a shared group's states are not nested, its statistics are kept for
    `build_compact`.

    Args:
        model: The dense model.
        factorise: The factorisation and its options.
        stream: Statistics by block name, a few blocks at a time; from `measure`.
        directory: Where the states are stored.
        ranks: By group name, if they are known; else full rank.
        progress: Called with (stage, done, total).

    Raises:
        UsageError: If weights or statistics are not finite.
    """
    report = progress or (lambda stage, done, total: None)
    fitted = FittedGroups(model, factorise.topology, Spill(directory))
    measured: dict[str, Statistics] = {}
    waiting = list(fitted.groups)

    def fit_ready() -> None:
        ready = list(waiting)
        known: list[list[Statistics]] = [[] for _ in waiting]
        if factorise.definition.measures.anything:
            ready = [group for group in waiting if all(member.name in measured for member in group.members)]
            known = [[measured[member.name] for member in group.members] for group in ready]
        wanted = [None if ranks is None else ranks[group.name] for group in ready]
        states = fit_all(ready, factorise, model.params, known, wanted)
        for group, statistics, found in zip(ready, known, states, strict=True):
            fitted.spill.put(group.name, found)
            if not factorise.is_bilinear or (ranks is None and not fitted.spill.nested(group.name)):
                fitted.statistics[group.name] = statistics
            waiting.remove(group)
            report("fit", len(fitted.groups) - len(waiting), len(fitted.groups))
        needed = {member.name for group in waiting for member in group.members}
        for name in [name for name in measured if name not in needed]:
            del measured[name]

    for statistics in stream:
        measured.update(statistics)
        del statistics  # or it would stay in memory while the next layer is measured
        fit_ready()
    fit_ready()
    return fitted


def build_compact(
    model: LanguageModel,
    factorise: Factorise,
    rule: RankRule,
    fitted: FittedGroups,
    *,
    donate: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Choose ranks, refit groups whose states are not nested, fix the gauge, and build the compact model.

    Args:
        model: The dense model.
        factorise: That of `fit_groups`, with any allocation and gauge.
        rule: How ranks are chosen.
        fitted: The fitted groups.
        donate: Delete the dense kernels that states replace.
        progress: Called with (stage, done, total).

    Returns:
        The compact model; it shares all parameters that no group replaces with the dense one.

    Raises:
        UsageError: If the keep ratio cannot be reached.
    """
    report = progress or (lambda stage, done, total: None)
    ranks = given_ranks(rule, fitted.groups) or choose_ranks(rule, fitted.cells, fitted.spill.energies)
    chosen = [group for group in fitted.groups if group.name in ranks]
    again = [
        group
        for group in chosen
        if group.name in fitted.statistics and ranks[group.name] != DENSE and not fitted.spill.nested(group.name)
    ]
    refitted: dict[str, Fitted] = {}
    states_again = fit_all(
        again,
        factorise,
        model.params,
        [fitted.statistics[group.name] for group in again],
        [ranks[group.name] for group in again],
    )
    for done, (group, found) in enumerate(zip(again, states_again, strict=True), start=1):
        refitted[group.name] = found
        report("refit", done, len(again))

    def states(name: str) -> Fitted:
        return refitted[name] if name in refitted else fitted.spill.get(name)

    if factorise.is_bilinear:
        return assemble(model, chosen, ranks, states, gauge=factorise.gauge, donate=donate)
    kernel, made = factorise.interaction, 0

    def params_of(group: Candidate, found: Factors) -> dict[str, Any]:
        nonlocal made
        names = [member.name for member in group.members]
        dense = [np.asarray(kernel_of(model.params, name), np.float64) for name in names]
        measured = shrunk(fitted.statistics[group.name], factorise.shrinkage)
        fitted_states, _ = fit_kernel(kernel, names, dense, measured, found, steps=factorise.fit_steps)
        made += 1
        report(f"fit {kernel.name} states", made, sum(ranks[other.name] != DENSE for other in chosen))
        return jax.tree.map(lambda leaf: leaf.astype(model.param_dtype), fitted_states)

    return assemble(model, chosen, ranks, states, gauge=False, donate=donate, kernel=kernel, params_of=params_of)


class FitCache(Closing):
    """The last full-rank fit, shared by conversions that differ in keep ratio, allocation or gauge; a context manager.

    Attributes:
        saved_seconds: Total time of the fits that were reused.
    """

    def __init__(self) -> None:
        self.saved_seconds = 0.0
        self._seconds = 0.0
        self._key: Hashable = None
        self._found: FittedGroups | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def get(self, key: Hashable, fit: Callable[[str], FittedGroups]) -> FittedGroups:
        """The fit of a key. If the last fit had another key, `fit` makes a new one in the directory it is given."""
        if self._found is None or key != self._key:
            self.close()
            self._directory = tempfile.TemporaryDirectory(prefix="ngc-jax-")
            started = time.perf_counter()
            self._found, self._key = fit(self._directory.name), key
            self._seconds = time.perf_counter() - started
        else:
            self.saved_seconds += self._seconds
        return self._found

    def close(self) -> None:
        """Remove the fit's files."""
        if self._directory is not None:
            self._directory.cleanup()
        self._found = self._directory = None
