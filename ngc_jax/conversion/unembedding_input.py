"""The second moment of what the unembedding reads: final hidden states, normed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from ngc_jax.conversion.state import Calibration
from ngc_jax.conversion.statistics import token_rows
from ngc_jax.conversion.symmetric_sums import add_products, mean_product, no_products
from ngc_jax.errors import UsageError
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import Compensated, Stack, each_batch, stack_batches
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params

Sums = tuple[Compensated, ...]


def measure_unembedding_input(
    model: LanguageModel, calibration: Calibration, *, progress: Callable[[int, int], None] | None = None
) -> Float[np.ndarray, "D D"]:
    """E[h h^T] of the final hidden states h, in float64, on the first `propagation_tokens` of a calibration text.

    Args:
        model: Dense or compact; quantised matrices are read as they are.
        calibration: The text, and how it is run.
        progress: Called with (batches done, total).

    Raises:
        UsageError: If there are no tokens, or hidden states are not finite.
    """
    tokens = calibration.tokens[: calibration.propagation_tokens]
    if not len(tokens):
        raise UsageError("there are no tokens to calibrate on; give a longer text")
    stacks = stack_batches(tokens, calibration.window, calibration.batch_size, 1, calibration.mesh)
    sums = no_products(model.config.embed_dim)
    for done, stack in enumerate(stacks, start=1):
        sums = _add_hidden(model.params, stack, sums, decoder=model.decoder, mesh=calibration.mesh)
        if progress is not None:
            jax.block_until_ready(sums)
            progress(done, len(stacks))
    moment = mean_product(sums, len(tokens))
    if not np.isfinite(moment).all():
        raise UsageError("the final hidden states are not finite; load the model with --dtype float32")
    return moment


@partial(jax.jit, static_argnames=("decoder", "mesh"), donate_argnames=("sums",))
def _add_hidden(params: Params, stack: Stack, sums: Sums, *, decoder: Decoder, mesh: Mesh | None) -> Sums:
    def step(params: Params, data: Mapping[str, Any], streams: None, sums: Sums) -> tuple[None, Sums]:
        h, _ = cast(Any, decoder.apply({"params": params}, data["tokens"], data["positions"], method="hidden"))
        return streams, add_products(sums, token_rows(h, data["mask"]))

    return each_batch(step, params, stack._asdict(), None, sums, mesh=mesh)[1]
