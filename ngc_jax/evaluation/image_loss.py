"""The loss of an image encoder, from the last layer's output.

With a classifier it is the cross-entropy with a class; otherwise half the squared distance of the outputs from a
target, the negative log-likelihood of a normal distribution of unit variance around them. If the targets are samples
from the model's own distribution, the second moment of the gradient is the Fisher information (Martens 2020,
arXiv 1412.1193, section 5).

Legend: B images, L tokens, D embed, V outputs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ngc_jax.evaluation.likelihood import cross_entropy, divergence
from ngc_jax.models.images import Images
from ngc_jax.types import Params

if TYPE_CHECKING:
    from ngc_jax.models.encoder import Encoder


def image_losses(encoder: Encoder, outputs: Float[Array, "B V"], targets: Array) -> Float[Array, " B"]:
    """The loss of each image, in nats; targets are classes (B,), or outputs (B, V) of a model without a classifier."""
    if encoder.config.head == "classes":
        return cross_entropy(outputs, targets)
    return jnp.square(outputs - targets).sum(axis=-1) / 2


def draw_targets(encoder: Encoder, outputs: Float[Array, "B V"], key: Key[Array, ""]) -> Array:
    """Samples from the distribution of an encoder's outputs: classes (B,), or vectors (B, V)."""
    if encoder.config.head == "classes":
        return jax.random.categorical(key, outputs).astype(jnp.int32)
    return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)


def image_loss_gradient(
    encoder: Any,
    ends: Params,
    x: Float[Array, "B L D"],
    teacher: Float[Array, "B L D"] | None,
    images: Images,
    positions: Int[Array, "B L"],
    key: Key[Array, ""] | None,
    loss: str,
) -> tuple[Array, Array]:
    """The summed loss and its gradient with respect to the last layer's output; see `output_gradients`.

    Args:
        encoder: The module.
        ends: Its parameters but for layers.
        x: The last layer's output.
        teacher: The teacher's; for the loss `teacher`.
        images: With the targets of the loss `text`.
        positions: -1 for padding.
        key: For the loss `sampled`, whose targets are samples from the model itself.
        loss: Of `output_gradients.Loss`.
    """
    mask_B = (positions[:, 0] >= 0).astype(jnp.float32)

    def outputs(x: Array) -> Array:
        normed = encoder.apply({"params": ends}, x, method="normed")
        y: Array = encoder.apply({"params": ends}, normed, method="logits")
        return y

    y, pull = jax.vjp(outputs, x)
    theirs = None if teacher is None else outputs(teacher)
    targets = images.targets
    if loss == "sampled":
        assert key is not None
        targets = draw_targets(encoder, y, key)

    def total(y: Array) -> Array:
        if loss != "teacher":
            losses = image_losses(encoder, y, targets)
        else:
            assert theirs is not None
            classes = encoder.config.head == "classes"
            losses = divergence(theirs, y) if classes else image_losses(encoder, y, theirs)
        return (losses * mask_B).sum()

    value, gradient = jax.value_and_grad(total)(y)
    return value, pull(gradient)[0]


@partial(jax.jit, static_argnames="encoder")
def _outputs(params: Params, pixels: Array, *, encoder: Encoder) -> Array:
    y: Any = encoder.apply({"params": params}, pixels)
    return cast(Array, y)


def outputs_of(
    encoder: Any, params: Params, pixels: Float[np.ndarray, "N C S S"], *, batch_size: int = 16, progress: Any = None
) -> Float[np.ndarray, "N V"]:
    """The outputs for images, batch by batch.

    Args:
        encoder: The module, of a dense or a compact model.
        params: Its parameters.
        pixels: Preprocessed images.
        batch_size: B.
        progress: Called with (images done, total).
    """
    found = []
    for start in range(0, len(pixels), batch_size):
        some = np.asarray(pixels[start : start + batch_size])
        padded = np.pad(some, ((0, batch_size - len(some)), *((0, 0),) * 3)) if start else some
        found.append(np.asarray(_outputs(params, padded, encoder=encoder))[: len(some)])
        if progress is not None:
            progress(start + len(some), len(pixels))
    return np.concatenate(found)
