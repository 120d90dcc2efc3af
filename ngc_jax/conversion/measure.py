"""The statistics that a conversion needs of every block of a dense model, measured one layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ngc_jax.conversion.fisher import measure_fisher
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.pruning import PRUNED_ROLES
from ngc_jax.conversion.state import Calibration, Needs, check_dense
from ngc_jax.conversion.statistics import InputSums, OutputGradients, Statistics, measure_inputs
from ngc_jax.host_memory import give_back_freed, handed_over
from ngc_jax.models.layerwise import BATCHES_PER_CALL
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Progress


@dataclasses.dataclass(frozen=True)
class Measured:
    """Statistics that are measured when they are read, for one conversion."""

    model: LanguageModel
    calibration: Calibration
    progress: Progress | None = None
    fits: None = None

    def stream(self, needs: Needs) -> Iterator[dict[str, Statistics]]:
        """As `measure`."""
        return measure(self.model, needs, self.calibration, self.progress)


def measure(
    model: LanguageModel, needs: Needs, calibration: Calibration, progress: Progress | None = None
) -> Iterator[dict[str, Statistics]]:
    """Measure the statistics of every block, one layer at a time.

    If all statistics are held anyway (`needs.held`), one forward pass serves both gradients and inputs, so that the
    tokens of the gradients are run once less.

    Args:
        model: The dense model.
        needs: What to measure.
        calibration: The text.
        progress: Called with (stage, done, total).

    Raises:
        UsageError: If the model is compact already, or there is nothing to measure.
    """
    check_dense(model)
    report = progress or (lambda stage, done, total: None)
    num_layers, tokens = model.config.num_layers, calibration.tokens
    some = dataclasses.replace(
        calibration,
        tokens=tokens[: calibration.gradient_tokens],
        batch_size=max(calibration.batch_size // 2, 1),
    )
    if not needs.anything:
        return
    # If only one layer's statistics are held although there are gradients, memory matters more than time.
    sparing = needs.gradients is not None and not needs.held
    batches_per_call = 1 if sparing else BATCHES_PER_CALL
    fisher = None
    if needs.fisher:
        fisher = measure_fisher(model, some.tokens, window=some.window, progress=lambda *a: report("gradients", *a))

    def gradients_of(layers: Sequence[int], inputs: InputSums | None = None) -> dict[str, OutputGradients]:
        return measure_output_gradients(
            model,
            some,
            GradientMeasurement(
                geometry=needs.gradients or "full",
                full_roles=PRUNED_ROLES if needs.whole else "",
                layers=layers,
            ),
            inputs=inputs,
            batches_per_call=batches_per_call,
            progress=lambda *a: report("gradients", *a),
        )[0]

    gradients: dict[str, OutputGradients] = {}
    begun: InputSums | None = None
    step = calibration.layers_per_pass or num_layers
    if needs.gradients is not None and needs.held and step >= num_layers:
        begun = InputSums(model.config)
        gradients = gradients_of(range(num_layers), begun)
    stream = measure_inputs(
        model,
        calibration if begun is None else dataclasses.replace(calibration, tokens=tokens[begun.count :]),
        begun=begun,
        keep_first=needs.first,
        batches_per_call=batches_per_call,
        progress=lambda *a: report("calibrate", *a),
    )
    for layer, statistics in stream:
        if needs.gradients is not None and begun is None and layer % step == 0:
            gradients = gradients_of(range(layer, min(layer + step, num_layers)))
        if fisher is not None:
            statistics = {n: dataclasses.replace(s, fisher=fisher[n]) for n, s in statistics.items()}
        if gradients:
            statistics = {n: dataclasses.replace(s, gradients=gradients.pop(n)) for n, s in statistics.items()}
        if sparing:
            give_back_freed()
        yield handed_over(statistics)
        if sparing:
            give_back_freed()
