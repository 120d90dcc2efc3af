"""What a recipe needs to know of every block of a dense model, one layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jax.sharding import Mesh

from ngc_jax.convert.gradients import measure_fisher
from ngc_jax.convert.narrow import NARROW_ROLES, narrow_recipe
from ngc_jax.convert.output_gradients import measure_output_gradients
from ngc_jax.convert.recipe import Recipe
from ngc_jax.convert.stacks import BATCHES_PER_CALL
from ngc_jax.convert.statistics import InputSums, OutputGradients, Statistics, calibrate
from ngc_jax.errors import UsageError
from ngc_jax.host_memory import give_back_freed, handed_over
from ngc_jax.models.load import LanguageModel

Progress = Callable[[str, int, int], None]
GRADIENT_TOKENS = 16_384


def measure(
    model: LanguageModel,
    recipe: Recipe,
    tokens: np.ndarray,
    *,
    gradient_tokens: int = GRADIENT_TOKENS,
    layers_per_pass: int | None = None,
    at_once: bool = False,
    keep_first: bool = False,
    window: int = 1024,
    batch_size: int = 4,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Statistics]]:
    """What a recipe needs to know of every block, one layer at a time; other arguments as for `convert`.

    Args:
        model: The dense model.
        recipe: What to measure for.
        tokens: (T,) calibration tokens.
        gradient_tokens: How many of them, from the first, gradients are taken on.
        layers_per_pass: Layers whose gradient statistics are held at once; all if None.
        at_once: The statistics of all layers will be held anyway. Then tokens that gradients are taken on are read
            once less: one forward pass serves gradients and inputs.
        keep_first: Then also keep what the blocks read of those tokens alone.
        window: Tokens in a calibration window.
        batch_size: Windows that run at once, on each device.
        mesh: Its axis "data" shares out the windows of a batch; None for one device. The parameters are on all of its
            devices.
        progress: Called with (stage, done, in all).

    Raises:
        UsageError: If the model is compact already, or there is nothing to measure.
    """
    if model.plan is not None:
        raise UsageError(f"{model.name} is a compact model already; convert the dense model it was made from")
    if model.config.iterations > 1:
        raise UsageError(f"{model.name} applies its layers {model.config.iterations} times, which cannot be converted")
    report = progress or (lambda stage, done, total: None)
    needs, config = recipe.definition.needs, model.config
    if needs == "nothing":
        return
    # Where no more than a layer's statistics are held although there are gradients, memory matters more than time.
    sparing = needs == "gradients" and not at_once
    batches_per_call = 1 if sparing else BATCHES_PER_CALL
    fisher = None
    if needs == "fisher":
        fisher = measure_fisher(model, tokens, window=window, progress=lambda *a: report("gradients", *a))

    def gradients_of(layers: Iterable[int], inputs: InputSums | None = None) -> dict[str, OutputGradients]:
        return measure_output_gradients(
            config,
            model.params,
            tokens[:gradient_tokens],
            geometry=recipe.gradients,
            full_roles=NARROW_ROLES if narrow_recipe(config, recipe)[0] != config else "",
            layers=list(layers),
            inputs=inputs,
            window=window,
            batch_size=max(batch_size // 2, 1),
            batches_per_call=batches_per_call,
            mesh=mesh,
            progress=lambda *a: report("gradients", *a),
        )[0]

    gradients: dict[str, OutputGradients] = {}
    begun: InputSums | None = None
    step = layers_per_pass or config.num_layers
    if needs == "gradients" and at_once and step >= config.num_layers:
        begun = InputSums(config)
        gradients = gradients_of(range(config.num_layers), begun)
    stream = calibrate(
        config,
        model.params,
        tokens if begun is None else tokens[begun.count :],
        begun=begun,
        keep_first=keep_first,
        window=window,
        batch_size=batch_size,
        batches_per_call=batches_per_call,
        mesh=mesh,
        progress=lambda *a: report("calibrate", *a),
    )
    for layer, statistics in stream:
        if needs == "gradients" and begun is None and layer % step == 0:
            gradients = gradients_of(range(layer, min(layer + step, config.num_layers)))
        if fisher is not None:
            statistics = {n: dataclasses.replace(s, fisher=fisher[n]) for n, s in statistics.items()}
        if gradients:
            statistics = {n: dataclasses.replace(s, gradients=gradients.pop(n)) for n, s in statistics.items()}
        if sparing:
            give_back_freed()
        yield handed_over(statistics)
        if sparing:
            give_back_freed()
