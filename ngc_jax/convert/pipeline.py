"""From a dense model, a recipe and calibration tokens to a compact model."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ngc_jax.convert.allocate import DENSE
from ngc_jax.convert.best_states import States
from ngc_jax.convert.candidates import Candidate, all_candidates, candidate_cells
from ngc_jax.convert.fit import assemble, fit_all, shrunk, shrunk_in_place
from ngc_jax.convert.kernel_fit import fit_kernel
from ngc_jax.convert.measure import GRADIENT_TOKENS, Progress, measure
from ngc_jax.convert.narrow import Narrowed, narrow_recipe, narrowed, removed_parameters
from ngc_jax.convert.propagate import propagate
from ngc_jax.convert.ranks import choose_ranks, given_ranks
from ngc_jax.convert.recipe import Recipe
from ngc_jax.convert.remeasure import remeasure, tokens_again
from ngc_jax.convert.spill import Fitted, Spill
from ngc_jax.convert.statistics import Statistics
from ngc_jax.models.load import LanguageModel, kernel_of
from ngc_jax.tokens import Bos, as_tokens, begin_windows, whole_windows

PROPAGATION_TOKENS = 16_384


def convert(
    model: LanguageModel,
    recipe: Recipe,
    tokens: np.ndarray,
    *,
    gradient_tokens: int = GRADIENT_TOKENS,
    propagation_tokens: int = PROPAGATION_TOKENS,
    layers_per_pass: int | None = None,
    window: int = 1024,
    batch_size: int = 4,
    bos: Bos = "auto",
    donate: bool = False,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Convert a dense model to a compact one: `measure`, `narrowed`, `fit_groups`, `finish`, `refine`.

    Args:
        model: The dense model.
        recipe: What to do.
        tokens: (T,) calibration tokens, one stream, or a text; see `as_tokens`. A method that looks at none takes
            none.
        gradient_tokens: How many of them, from the first, gradients are taken on.
        propagation_tokens: How many of them, from the first, inputs of the converted layers are measured on.
        layers_per_pass: Layers whose gradient statistics are held at once; all if None.
        window: Tokens in a calibration window.
        batch_size: Windows that run at once, on each device.
        bos: What comes before each window, as `Tokenizer.prefix` says. It is measured with the rest, as it is read
            with every text.
        donate: Give up the dense model: a kernel is deleted as soon as its states are made, so that both models never
            are in memory at once.
        mesh: Its axis "data" shares out the windows of a batch; the parameters go to all of its devices, which this
            process has. None for one device.
        progress: Called with (stage, done, in all).

    Raises:
        UsageError: If the model is compact already, the tokens are none of its own, or calibration fails.
    """
    if recipe.reads_text:
        tokenizer = None if bos == "never" and not isinstance(tokens, str) else model.load_tokenizer()
        tokens = as_tokens(tokens, model.config.vocab_size, tokenizer=tokenizer, least=2)
        prefix = () if tokenizer is None else tokenizer.prefix(bos)
        tokens = begin_windows(tokens, window, prefix)
        gradient_tokens = whole_windows(gradient_tokens, window, prefix)
        propagation_tokens = whole_windows(propagation_tokens, window, prefix)
    if mesh is not None:
        params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()), donate=donate)
        model = dataclasses.replace(model, params=params)
    refined = bool(recipe.resolved_rounds or recipe.resolved_propagation)
    stream: Iterable[dict[str, Statistics]] = measure(
        model,
        recipe,
        tokens,
        gradient_tokens=gradient_tokens,
        layers_per_pass=layers_per_pass,
        at_once=refined,
        keep_first=bool(recipe.resolved_propagation) and propagation_tokens == gradient_tokens,
        window=window,
        batch_size=batch_size,
        mesh=mesh,
        progress=progress,
    )
    config, inner = narrow_recipe(model.config, recipe)
    removed = removed_parameters(model.config, config, recipe)
    narrow: Narrowed | None = None
    dense = model
    if removed:
        narrow = narrowed(
            model,
            config,
            stream,
            shrinkage=recipe.resolved_shrinkage,
            at_once=(os.cpu_count() or 1) if refined else 1,
            donate=donate and not refined,
        )
        model, recipe, stream = narrow.model, inner, narrow.statistics
    groups = all_candidates(candidate_cells(config, recipe.resolved_topology))
    ranks = given_ranks(recipe, groups) or None
    kept: list[dict[str, Statistics]] = []
    if refined:
        stream = _keep(stream, kept)
    else:
        # Nothing looks at them again: shrunk where they are, which saves a copy of the largest.
        stream = map(functools.partial(shrunk_in_place, shrinkage=recipe.resolved_shrinkage), stream)
        recipe = dataclasses.replace(recipe, shrinkage=0.0)
    with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
        fitted = fit_groups(model, recipe, stream, directory, ranks=ranks, progress=progress)
        compact = finish(model, recipe, fitted, donate=donate and not refined, progress=progress)
    del fitted
    compact = refine(
        model,
        recipe,
        compact,
        kept,
        tokens,
        wide=None if narrow is None else (dense, narrow.kept),
        gradient_tokens=gradient_tokens,
        propagation_tokens=propagation_tokens,
        window=window,
        batch_size=batch_size,
        mesh=mesh,
        donate=donate,
        progress=progress,
    )
    assert compact.plan is not None
    return dataclasses.replace(compact, plan=dataclasses.replace(compact.plan, removed=removed))


def refine(
    model: LanguageModel,
    recipe: Recipe,
    compact: LanguageModel,
    statistics: list[dict[str, Statistics]],
    tokens: np.ndarray,
    *,
    wide: tuple[LanguageModel, Mapping[int, np.ndarray]] | None = None,
    gradient_tokens: int = GRADIENT_TOKENS,
    propagation_tokens: int = PROPAGATION_TOKENS,
    window: int = 1024,
    batch_size: int = 4,
    donate: bool = False,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Convert anew as often as a recipe has rounds, on gradients measured again, then propagate errors.

    Args:
        model: The dense model, narrow if hidden neurons went.
        recipe: What to do; with neither, the compact model is returned as it is.
        compact: From `finish`.
        statistics: What it was converted with, layer by layer. What is measured again takes its place in the list, so
            that the old gradients are let go.
        tokens: (T,) calibration tokens.
        wide: Where hidden neurons went, the dense model that had them, and by layer those that stayed. Its errors are
            propagated too.
        gradient_tokens: As for `convert`.
        propagation_tokens: As for `convert`.
        window: Tokens in a calibration window.
        batch_size: Windows that run at once, on each device.
        donate: Delete the dense kernels that states replace.
        mesh: As for `convert`; the parameters are on all of its devices.
        progress: Called with (stage, done, in all).
    """
    groups = all_candidates(candidate_cells(model.config, recipe.resolved_topology))
    ranks = given_ranks(recipe, groups) or None
    for left in reversed(range(recipe.resolved_rounds)):
        some = tokens_again(tokens, gradient_tokens)
        statistics[:] = remeasure(model, recipe, compact, statistics, some, window=window, mesh=mesh, progress=progress)
        with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
            fitted = fit_groups(model, recipe, statistics, directory, ranks=ranks, progress=progress)
            last = not left and not recipe.resolved_propagation
            compact = finish(model, recipe, fitted, donate=donate and last, progress=progress)
    if not recipe.resolved_propagation:
        return compact
    return propagate(
        model,
        recipe,
        compact,
        statistics,
        tokens[:propagation_tokens],
        wide=wide,
        window=window,
        batch_size=batch_size,
        mesh=mesh,
        donate=donate,
        progress=progress,
    )


def _keep(
    stream: Iterable[dict[str, Statistics]], kept: list[dict[str, Statistics]]
) -> Iterator[dict[str, Statistics]]:
    for statistics in stream:
        kept.append(statistics)
        yield statistics


class FittedGroups:
    """All candidate groups of a recipe, fitted; `finish` makes a model of them at any keep ratio.

    Attributes:
        cells: Ways to group the same blocks.
        groups: The groups of all ways.
        spill: Their states.
        statistics: Of the members of those groups that must be fitted again when their rank is known.
    """

    def __init__(self, model: LanguageModel, recipe: Recipe, spill: Spill) -> None:
        self.cells = candidate_cells(model.config, recipe.resolved_topology)
        self.groups = all_candidates(self.cells)
        self.spill = spill
        self.statistics: dict[str, list[Statistics]] = {}


def fit_groups(
    model: LanguageModel,
    recipe: Recipe,
    stream: Iterable[Mapping[str, Statistics]],
    directory: str | Path,
    *,
    ranks: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> FittedGroups:
    """Fit every group of a recipe's topology as soon as the last of its members has been measured.

    Its statistics are dropped then, so that a topology within layers holds the statistics of one layer at a time; the
    states wait on disk. Where a shared group's states are not nested, its statistics are kept for `finish`.

    Args:
        model: The dense model.
        recipe: What to do; its keep ratio does not matter here.
        stream: Statistics by block name, a few blocks at a time; from `measure`.
        directory: For the states.
        ranks: Of every group by name if they are known; else full.
        progress: Called with (stage, done, in all).

    Raises:
        UsageError: If weights or statistics are not finite.
    """
    report = progress or (lambda stage, done, total: None)
    fitted = FittedGroups(model, recipe, Spill(directory))
    measured: dict[str, Statistics] = {}
    waiting = list(fitted.groups)

    def fit_ready() -> None:
        ready = list(waiting)
        known: list[list[Statistics]] = [[] for _ in waiting]
        if recipe.definition.needs != "nothing":
            ready = [group for group in waiting if all(member.name in measured for member in group.members)]
            known = [[measured[member.name] for member in group.members] for group in ready]
        wanted = [None if ranks is None else ranks[group.name] for group in ready]
        states = fit_all(ready, recipe, model.params, known, wanted)
        for group, statistics, found in zip(ready, known, states, strict=True):
            fitted.spill.put(group.name, found)
            if not recipe.is_bilinear or (ranks is None and not fitted.spill.nested(group.name)):
                fitted.statistics[group.name] = statistics
            waiting.remove(group)
            report("fit", len(fitted.groups) - len(waiting), len(fitted.groups))
        needed = {member.name for group in waiting for member in group.members}
        for name in [name for name in measured if name not in needed]:
            del measured[name]

    for statistics in stream:
        measured.update(statistics)
        del statistics  # or it would live on while the next layer is measured
        fit_ready()
    fit_ready()
    return fitted


def finish(
    model: LanguageModel,
    recipe: Recipe,
    fitted: FittedGroups,
    *,
    donate: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Choose ranks, fit again what is not nested, fix the gauge, and build the compact model.

    Args:
        model: The dense model.
        recipe: That of `fit_groups`, at any keep ratio and with any allocation and gauge.
        fitted: Its groups.
        donate: Delete the dense kernels that states replace.
        progress: Called with (stage, done, in all).

    Returns:
        The compact model; parameters that no group replaces are shared with the dense one.

    Raises:
        UsageError: If the keep ratio cannot be reached.
    """
    report = progress or (lambda stage, done, total: None)
    ranks = given_ranks(recipe, fitted.groups) or choose_ranks(recipe, fitted.cells, fitted.spill.energies)
    chosen = [group for group in fitted.groups if group.name in ranks]
    again = [
        group
        for group in chosen
        if group.name in fitted.statistics and ranks[group.name] != DENSE and not fitted.spill.nested(group.name)
    ]
    refitted: dict[str, Fitted] = {}
    states_again = fit_all(
        again,
        recipe,
        model.params,
        [fitted.statistics[group.name] for group in again],
        [ranks[group.name] for group in again],
    )
    for done, (group, found) in enumerate(zip(again, states_again, strict=True), start=1):
        refitted[group.name] = found
        report("refit", done, len(again))

    def states(name: str) -> Fitted:
        return refitted[name] if name in refitted else fitted.spill.get(name)

    if recipe.is_bilinear:
        return assemble(model, chosen, ranks, states, gauge=recipe.resolved_gauge, donate=donate)
    kernel, made = recipe.interaction, 0

    def params_of(group: Candidate, found: States) -> dict[str, Any]:
        nonlocal made
        names = [member.name for member in group.members]
        dense = [np.asarray(kernel_of(model.params, name), np.float64) for name in names]
        measured = shrunk(fitted.statistics[group.name], recipe.resolved_shrinkage)
        fitted_states, _ = fit_kernel(kernel, names, dense, measured, found, steps=recipe.fit_steps)
        made += 1
        report(f"fit {kernel.name} states", made, sum(ranks[other.name] != DENSE for other in chosen))
        return jax.tree.map(lambda leaf: leaf.astype(model.dtype), fitted_states)

    return assemble(model, chosen, ranks, states, gauge=False, donate=donate, kernel=kernel, params_of=params_of)
