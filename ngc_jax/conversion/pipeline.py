"""From a dense model, a chain of passes and a calibration text to a compact model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ngc_jax.conversion.chains import Chain, Pass, chain
from ngc_jax.conversion.methods import Recipe, check_keep, method_chain
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.passes.quantise import Quantise
from ngc_jax.conversion.passes.refine import Refine
from ngc_jax.conversion.registry import option_types
from ngc_jax.conversion.state import Calibration, ConversionState, Measurements, check_dense
from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.planning.candidates import candidate_cells, planned_blocks
from ngc_jax.planning.ranks import check_budget
from ngc_jax.types import Progress

if TYPE_CHECKING:
    from ngc_jax.models.load import LanguageModel


def convert(
    model: LanguageModel,
    how: str | Recipe | Chain | Pass,
    calibration: Any = None,
    *,
    keep: float | None = None,
    measurements: Measurements | None = None,
    donate: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> LanguageModel:
    """Convert a dense model to a compact one.

    Args:
        model: The dense model.
        how: The name of a method, a recipe, a chain of passes, or a single pass.
        calibration: A `Calibration`; or a text or token ids (T,), which `Calibration.of` takes with `options`; of an
            image encoder, images or their directory. Not needed by a method that measures nothing.
        keep: Keep ratio: stored over dense parameters of the grouped blocks, above 0 and at most 1; 0.8 by default.
        measurements: Source of the statistics, if they are not to be measured now.
        donate: Consume the dense model: each weight is deleted as soon as its states are made, so that both models are
            never in memory at once.
        progress: Called with (stage, done, total).
        options: Of the calibration, such as `window` and `bos`; with the name of a method also its own, such as
            `form="dense"`.

    Returns:
        The compact model; it shares parameters that are not replaced with the dense one.

    Raises:
        UsageError: If the model is compact already, the tokens are not the model's, options contradict each other, or
            the keep ratio cannot be reached.

    Example:
        >>> compact = convert(model, "svd_llm", text, keep=0.8, window=32)
        >>> from ngc_jax import chain, factorise, prune_neurons
        >>> own = chain(prune_neurons(0.9), factorise("svd_llm", gauge=True))
        >>> compact = convert(model, own, text, keep=0.8, window=32)
        >>> compact.plan.keep_ratio() <= 0.8
        True
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from ngc_jax.conversion.measure import Measured

    own = {name: options.pop(name) for name in set(options) & set(option_types())}
    passes, keep = resolve(how, keep, own)
    chosen = how.options if isinstance(how, Recipe) else tuple(own.items())
    by_default = not isinstance(how, Chain | Pass) and dict(chosen).get("topology") is None
    passes = for_experts(passes, model.config, by_default=by_default)
    check_dense(model)
    check_conversion(model.config, passes, keep)
    if not isinstance(calibration, Calibration):
        reads = reads_text(model.config, passes, keep)
        if reads and calibration is None:
            what = (
                "a text; give one, or its token ids" if model.config.causal else "images; give some, or their directory"
            )
            raise UsageError(f"method {passes.method} reads {what}")
        calibration = calibration if reads else None
    calibration = Calibration.given(model, calibration, options)
    if calibration.mesh is not None:
        everywhere = NamedSharding(calibration.mesh, PartitionSpec())
        model = dataclasses.replace(model, params=jax.device_put(model.params, everywhere, donate=donate))
    source: Measurements = Measured(model, calibration, progress) if measurements is None else measurements
    needs = passes.needs(model.config, keep, calibration)
    state = passes.apply(
        ConversionState(
            model,
            keep,
            passes,
            calibration,
            statistics=source.stream(needs),
            held=needs.held,
            donate=donate and not any(one.keeps_dense for one in passes),
            fits=source.fits,
            progress=progress,
        )
    )
    compact = state.compact if state.compact is not None else _without_groups(state)
    assert compact.plan is not None
    return dataclasses.replace(compact, plan=dataclasses.replace(compact.plan, removed=state.removed))


def resolve(
    how: str | Recipe | Chain | Pass, keep: float | None, options: Mapping[str, Any] | None = None
) -> tuple[Chain, float]:
    """The passes and the keep ratio of the argument of `convert`; options are of a method that is given by its name.

    Raises:
        UsageError: If a recipe has another keep ratio, `how` is none of the four, or options come without a name.
    """
    if options and not isinstance(how, str):
        raise UsageError(f"{min(options)} is an option of a method; set it in the recipe or in the passes of the chain")
    if isinstance(how, Recipe):
        if keep not in (None, how.keep):
            raise UsageError(f"keep ratio {keep:g} is given, and the recipe's is {how.keep:g}; give one of them")
        return how.chain, how.keep
    keep = 0.8 if keep is None else keep
    check_keep(keep)
    if isinstance(how, str):
        return method_chain(how, keep, options), keep
    if isinstance(how, Pass):
        return chain(how), keep
    if not isinstance(how, Chain):
        raise UsageError(f"{how!r} is not a conversion; expected the name of a method, a Recipe, a pass, or chain(...)")
    return how, keep


# The default topology of models with experts, for methods that allocate ranks by the expected loss.
EXPERTS_TOPOLOGY = "q-k-v-o-u?-g?-d"


def for_experts(passes: Chain, config: DecoderConfig, *, by_default: bool = False) -> Chain:
    """The passes for a model with mixtures of experts; all others as they are.

    Where the expected loss allocates ranks and the topology is a method's own, it also chooses between groups of each
    expert's own and groups that all experts of a layer share.

    Args:
        passes: The chain.
        config: The model's.
        by_default: Whether the topology is the method's own, not the user's.

    Raises:
        UsageError: If a pass cannot convert mixtures of experts.
    """
    if config.experts is None:
        return passes
    factorise = passes.find(Factorise)
    for one in passes:
        if one.name == "quantise":
            raise UsageError(f"{config.architecture} models cannot be quantised: their MLPs are mixtures of experts")
        if one.name == "propagate_errors" and factorise is not None and factorise.is_dense:
            raise UsageError(
                f"in form dense no errors are propagated in {config.architecture} models, whose MLPs are mixtures of "
                "experts; set propagation to 0"
            )
    own = factorise is not None and factorise.topology == Factorise.topology and factorise.allocation == "loss"
    if factorise is None or not by_default or not own:
        return passes
    chosen = dataclasses.replace(factorise, topology=EXPERTS_TOPOLOGY)
    return Chain(tuple(chosen if one is factorise else one for one in passes), passes.method)


def reads_text(config: DecoderConfig, passes: Chain, keep: float) -> bool:
    """Whether a chain reads a calibration text."""
    measures = passes.needs(config, keep, Calibration(np.zeros(0, np.int32))).anything
    return measures or any(one.reads_text and not one.is_off for one in passes)


def check_conversion(config: DecoderConfig, passes: Chain, keep: float) -> None:
    """Refuse, before anything is loaded or measured, what a chain cannot do to an architecture.

    Raises:
        UsageError: If the keep ratio is too low, or a pass or an option is for language models only.
    """
    if not config.causal:
        check_for_encoders(passes)
    pruned, left = passes.plan(config, keep)
    factorise = passes.find(Factorise)
    if factorise is not None and factorise.rank is None:
        check_budget(factorise.rule(left, passes.method), candidate_cells(pruned, factorise.topology))


def check_for_encoders(passes: Chain) -> None:
    """Refuse what image encoders cannot have done to them.

    Raises:
        UsageError: If a chain quantises, refines, or limits a key-value cache.
    """
    if passes.find(Refine) is not None:
        raise UsageError("image encoders are not refined yet; leave out refine-tokens")
    if passes.find(Quantise) is not None:
        raise UsageError("image encoders are not quantised yet; leave out bits")
    factorise = passes.find(Factorise)
    if factorise is not None and factorise.cache_ratio is not None:
        raise UsageError("image encoders have no key-value cache; leave out cache ratio")


def _without_groups(state: ConversionState) -> LanguageModel:
    """The result of a chain without a factorisation: a smaller dense model."""
    for _ in state.statistics:  # neurons are pruned as statistics are read
        pass
    dense = tuple(planned_blocks(state.dense.config, Factorise().topology).values())
    return dataclasses.replace(state.dense, plan=Plan((), dense))
