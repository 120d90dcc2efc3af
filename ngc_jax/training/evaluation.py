"""Perplexity during training: of sharded parameters, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ngc_jax.evaluation.likelihood import scored_sums
from ngc_jax.models.decoder import Decoder
from ngc_jax.text import split_windows
from ngc_jax.tokens import begin_windows
from ngc_jax.training import sharding
from ngc_jax.training.trainable import merge_params
from ngc_jax.types import Params

WINDOW = 1024


def perplexity_on(
    tokens: np.ndarray, prefix: Sequence[int], decoder: Decoder, frozen: Params, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """A function from trained parameters to perplexity on `tokens`, in windows of `WINDOW`.

    Args:
        tokens: (T,), one stream without special tokens.
        prefix: The prefix of each window, such as BOS; it is not scored.
        decoder: The model, with its computation type.
        frozen: Its parameters that do not train.
        mesh: Of all devices; the windows are sharded over its axes data and fsdp.

    Returns:
        A function for `loop.train`.
    """
    split, context = mesh.shape["data"] * mesh.shape["fsdp"], max(len(prefix), 1)
    placed = sharding.put(frozen, sharding.params_shardings(frozen, mesh))
    windows = split_windows(begin_windows(tokens, WINDOW, prefix), WINDOW, max(4 // split, 1) * split)

    @jax.jit
    def score(trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params = merge_params(trained, frozen)
        likelihoods, counts = scored_sums(decoder, params, batch["tokens"], batch["positions"], context=context)
        return likelihoods.sum(), counts.sum()

    def evaluate(trained: Params) -> dict[str, float]:
        total = count = 0.0
        for rows, positions in windows:
            whole = {"tokens": rows, "positions": positions}
            share = len(rows) // jax.process_count()
            mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
            batch = sharding.put_batch({name: x[mine] for name, x in whole.items()}, mesh)
            likelihood, scored = score(trained, placed, batch)
            total += float(np.asarray(likelihood.addressable_data(0)))
            count += float(np.asarray(scored.addressable_data(0)))
        return {"perplexity": math.exp(min(-total / count, 700.0))}

    return evaluate
