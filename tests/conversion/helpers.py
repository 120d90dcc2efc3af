"""Parts of a conversion by themselves, as the whole would call them."""

import dataclasses

from ngc_jax.conversion.measure import measure
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.passes.propagate_errors import PropagateErrors
from ngc_jax.conversion.passes.prune_neurons import PruneNeurons
from ngc_jax.conversion.propagation import propagate
from ngc_jax.conversion.remeasuring import remeasured
from ngc_jax.conversion.state import Calibration, ConversionState


def factorise_of(recipe):
    return recipe.chain.find(Factorise)


def rule_of(recipe):
    return factorise_of(recipe).rule(recipe.keep, recipe.method)


def pruning_of(config, recipe):
    """What pruning hidden neurons leaves to plan; None if the recipe prunes none."""
    prune = recipe.chain.find(PruneNeurons)
    return None if prune is None else prune.pruning(config, recipe.keep, recipe.chain)


def measured(model, recipe, tokens, held=False, first=False, **options):
    """The needs of a recipe, with `held` and `first` as given instead of by its passes."""
    calibration = Calibration.of(model, tokens, bos="never", **options)
    needs = recipe.chain.needs(model.config, recipe.keep, calibration)
    return measure(model, dataclasses.replace(needs, held=held, first=first), calibration)


def state_of(model, recipe, compact, statistics, tokens, **options):
    """A conversion that has come to a compact model."""
    calibration = Calibration.of(model, tokens, bos="never", **options)
    return ConversionState(
        model, recipe.keep, recipe.chain, calibration, list(statistics), compact, held=True, last=True
    )


def remeasured_of(model, recipe, compact, statistics, tokens, sensitivities=True, **options):
    """With gradients of the compact model on all of the tokens."""
    # The tokens for the converted model are those after the dense model's: none but these.
    options = {"gradient_tokens": 2 * len(tokens), **options}
    state = state_of(model, recipe, compact, statistics, tokens, **options)
    return remeasured(state, factorise_of(recipe), sensitivities=sensitivities)


def propagated(model, recipe, compact, statistics, tokens, **options):
    """With errors propagated on all of the tokens."""
    state = state_of(model, recipe, compact, statistics, tokens, **options)
    strength = recipe.chain.find(PropagateErrors).propagation
    return propagate(state, factorise_of(recipe), strength)
