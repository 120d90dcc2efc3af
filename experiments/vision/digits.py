"""A small vision transformer, trained from scratch on scikit-learn's handwritten digits (package data).

Legend: N images, B images of a batch, S height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ngc_jax.evaluation.image_loss import image_losses
from ngc_jax.models.encoder import Encoder
from ngc_jax.models.vision import VisionModel, make_encoder
from ngc_jax.types import Params

HF_CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
    "layer_norm_eps": 1e-6,
}
TRAIN = 1000
BATCH = 100


class Labelled(NamedTuple):
    """Images (N, 1, 8, 8), float32 in -1 to 1, and their classes (N,)."""

    pixels: Float[np.ndarray, "N 1 S S"]
    labels: Int[np.ndarray, " N"]


def load_digits() -> tuple[Labelled, Labelled]:
    """1,000 images to train on and 797 to test with, in a fixed random order.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing (extra `test`).
    """
    from sklearn.datasets import load_digits as load

    data = load()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = (data.images[order, None] / 8.0 - 1.0).astype(np.float32)
    labels = data.target[order].astype(np.int32)
    return Labelled(pixels[:TRAIN], labels[:TRAIN]), Labelled(pixels[TRAIN:], labels[TRAIN:])


def shifted(pixels: Float[Array, "B 1 S S"], key: Array) -> Float[Array, "B 1 S S"]:
    """Every image moved by up to one pixel in each direction; background enters at the edges."""
    moves = jax.random.randint(key, (len(pixels), 2), 0, 3)
    padded = jnp.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)

    def one(image: Array, move: Array) -> Array:
        return jax.lax.dynamic_slice(image, (0, move[0], move[1]), pixels.shape[1:])

    return jax.vmap(one)(padded, moves)


def train_digits(
    data: Labelled, *, epochs: int = 60, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> VisionModel:
    """A classifier trained with AdamW and randomly shifted images.

    Args:
        data: Training images.
        epochs: Passes over them.
        seed: Of the first weights, the order of images and their shifts.
        progress: Called with (epochs done, total).
    """
    model = make_encoder("digits", HF_CONFIG, seed=seed)
    steps = epochs * (len(data.labels) // BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(steps // 10, 50), steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)
    params, state, key = model.params, optimizer.init(model.params), jax.random.key(seed)
    order = np.random.default_rng(seed)
    for epoch in range(epochs):
        shuffled = order.permutation(len(data.labels))
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            chosen = shuffled[start : start + BATCH]
            key, own = jax.random.split(key)
            batch = data.pixels[chosen], data.labels[chosen]
            params, state = _step(params, state, *batch, own, encoder=model.encoder, optimizer=optimizer)
        if progress is not None:
            jax.block_until_ready(params)
            progress(epoch + 1, epochs)
    return dataclasses.replace(model, params=params)


@partial(jax.jit, static_argnames=("encoder", "optimizer"))
def _step(
    params: Params,
    state: Any,
    pixels: Array,
    labels: Array,
    key: Array,
    *,
    encoder: Encoder,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, Any]:
    def loss(params: Params) -> Array:
        outputs: Any = encoder.apply({"params": params}, shifted(pixels, key))
        return image_losses(encoder, outputs, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
