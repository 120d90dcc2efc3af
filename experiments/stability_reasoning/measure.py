"""Measurements of a model for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stability_reasoning.prompts import common_suffix
from ngc_jax.models.load import LanguageModel
from ngc_jax.stability.depth import depth_stability
from ngc_jax.stability.driving import potential_over_alone
from ngc_jax.stability.sequence import sequence_stability

Progress = Callable[[int, int], None]
KEY = 0


def along_depth(
    model: LanguageModel,
    pairs: Sequence[tuple[np.ndarray, ...]],
    *,
    directions: int,
    progress: Progress | None = None,
) -> list[list[dict[str, float]]]:
    """Metric and potential's share of both prompts of every pair, or of single prompts.

    Args:
        model: Dense or compact.
        pairs: Token ids of both prompts, or of one.
        directions: Number of directions of the metric.
        progress: Called with (pairs done, total).

    Returns:
        One row for each prompt: tokens; metric and share, means over all tokens but the first; and the same over
        the tokens that the prompts have in common at their ends, `common_metric` and `common_share`.
    """
    width = max(len(tokens) for pair in pairs for tokens in pair)
    found = []
    for pair in pairs:
        common = common_suffix(pair[0], pair[-1])
        rows = []
        for tokens in pair:
            count = len(tokens)
            row, length = jnp.asarray(np.pad(tokens, (0, width - count)))[None], jnp.asarray([count])
            given = (model.decoder, model.params, row, length)
            depth = depth_stability(*given, key=jax.random.key(KEY), directions=directions)
            metric = np.asarray(depth.metric[0, :count], float)
            share = np.asarray(potential_over_alone(*given).share[0, :count], float).mean(axis=1)
            rows.append(
                {
                    "tokens": count,
                    "common": common,
                    "metric": float(metric[1:].mean()),
                    "share": float(share[1:].mean()),
                    "common_metric": float(metric[count - common :].mean()),
                    "common_share": float(share[count - common :].mean()),
                }
            )
        found.append(rows)
        if progress is not None:
            progress(len(found), len(pairs))
    return found


def along_sequence(
    model: LanguageModel,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    directions: int,
    memory: int,
    progress: Progress | None = None,
) -> list[list[dict[str, Any]]]:
    """The metric along the sequence of both prompts of every pair, as rows with the entry `sequence`."""
    width = max(len(tokens) for pair in pairs for tokens in pair)
    found = []
    for pair in pairs:
        rows = []
        for tokens in pair:
            row, length = jnp.asarray(np.pad(tokens, (0, width - len(tokens))))[None], jnp.asarray([len(tokens)])
            result = sequence_stability(
                model.decoder, model.params, row, length, key=jax.random.key(KEY), directions=directions, memory=memory
            )
            rows.append({"sequence": float(result.metric[0])})
        found.append(rows)
        if progress is not None:
            progress(len(found), len(pairs))
    return found
