"""Diagonal Fisher information of the language-model loss, by backward passes over calibration text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.evaluation.likelihood import token_log_likelihoods
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.text import split_windows
from ngc_jax.tokens import as_tokens
from ngc_jax.types import Params


@partial(jax.jit, static_argnames=("decoder",))
def _squared_gradients(params: Params, tokens: jax.Array, positions: jax.Array, *, decoder: Decoder) -> Params:
    """Squared gradient of one window's mean loss with respect to every kernel, summed over outputs."""

    def loss(layers: Params) -> jax.Array:
        likelihoods, mask = token_log_likelihoods(decoder, {**params, "layers": layers}, tokens, positions)
        return -(likelihoods * mask).sum() / jnp.maximum(mask.sum(), 1)

    gradients = jax.grad(loss)(params["layers"])
    return jax.tree_util.tree_map_with_path(
        # Outputs are the last axis but one: kernels of experts are stacked.
        lambda path, g: jnp.square(g).sum(axis=-2) if path[-1].key == "kernel" else jnp.zeros(()),
        gradients,
    )


def measure_fisher(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    window: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Diagonal empirical Fisher information of every block, summed over its outputs.

    One window is one sample: the squared gradient is averaged over windows (FWSVD, arXiv 2207.00112, eq. 5).

    Args:
        model: The dense model.
        tokens: (T,) calibration tokens.
        window: Tokens in a window.
        progress: Called with (windows done, total).

    Returns:
        By block name, (d_in,) float64.
    """
    batches = split_windows(as_tokens(tokens, model.config.vocab_size), window, 1)
    decoder = model.decoder.clone(plan=None, remat=True)
    sums = {block.name: np.zeros(block.d_in) for block in model.config.blocks()}
    for done, (window_tokens, positions) in enumerate(batches, start=1):
        squares = _squared_gradients(model.params, window_tokens, positions, decoder=decoder)
        for block, total in sums.items():
            _, layer, part, role, *expert = block.split(".")
            found = squares[layer][part][role]["kernel"]
            total += np.asarray(found[int(expert[0])] if expert else found, np.float64)
        if progress is not None:
            progress(done, len(batches))
    return {name: total / len(batches) for name, total in sums.items()}
