"""Diagonal Fisher information of the language-model loss, by backward passes over calibration text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.evaluation.image_loss import image_losses
from ngc_jax.evaluation.likelihood import token_log_likelihoods
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.images import ImageStream
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

    return _squared(jax.grad(loss)(params["layers"]))


@partial(jax.jit, static_argnames=("encoder",))
def _squared_of_image(params: Params, pixels: jax.Array, targets: jax.Array, *, encoder: Any) -> Params:
    """As `_squared_gradients`, of one image's loss."""

    def loss(layers: Params) -> jax.Array:
        return image_losses(encoder, encoder.apply({"params": {**params, "layers": layers}}, pixels), targets)[0]

    return _squared(jax.grad(loss)(params["layers"]))


def _squared(gradients: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        # Outputs are the last axis but one: kernels of experts are stacked.
        lambda path, g: jnp.square(g).sum(axis=-2) if path[-1].key == "kernel" else jnp.zeros(()),
        gradients,
    )


def measure_fisher(
    model: LanguageModel,
    tokens: np.ndarray | ImageStream,
    *,
    window: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Diagonal empirical Fisher information of every block, summed over its outputs.

    One window is one sample: the squared gradient is averaged over windows (FWSVD, arXiv 2207.00112, eq. 5).

    Args:
        model: The dense model.
        tokens: (T,) calibration tokens; or images, each of which is one sample.
        window: Tokens in a window.
        progress: Called with (windows done, total).

    Returns:
        By block name, (d_in,) float64.
    """
    if isinstance(tokens, ImageStream):
        return _measure_on_images(model, tokens, progress)
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


def _measure_on_images(
    model: LanguageModel, images: ImageStream, progress: Callable[[int, int], None] | None
) -> dict[str, np.ndarray]:
    encoder = model.decoder.clone(plan=None, remat=True)
    sums = {block.name: np.zeros(block.d_in) for block in model.config.blocks()}
    batches = images.batches(1)
    for done, (image, _) in enumerate(batches, start=1):
        squares = _squared_of_image(model.params, *image, encoder=encoder)
        for block, total in sums.items():
            _, layer, part, role = block.split(".")
            total += np.asarray(squares[layer][part][role]["kernel"], np.float64)
        if progress is not None:
            progress(done, len(batches))
    return {name: total / len(batches) for name, total in sums.items()}
