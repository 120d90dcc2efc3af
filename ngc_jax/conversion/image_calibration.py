"""Calibration on images, with targets that are drawn from the model's own predictions.

Images have no labels here, and need none: the Fisher information, whose factors conversions estimate, is an expectation
over the model's own distribution of outputs (Martens 2020, arXiv 1412.1193, section 5). One target is drawn for each
image: a class, or for a model without a classifier a normal vector around its outputs.

Legend: N images, C channels, S height and width, L tokens of an image, V outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.images import Images, ImageStream, check_pixels
from ngc_jax.models.preprocessing import image_files

if TYPE_CHECKING:
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.vision import VisionModel

# Tokens of a batch; a batch has at least `_LEAST` images.
_TOKENS_AT_ONCE, _LEAST = 1024, 4
# In the place of targets of images on which no gradients are measured: an error shows as NaN.
_NO_CLASS = 2**30


def image_calibration(
    model: LanguageModel, images: Any, options: Mapping[str, Any], gradient_tokens: int
) -> dict[str, Any]:
    """The fields of a `Calibration` on images; see `Calibration.of`.

    Args:
        model: An image encoder, whose outputs the targets are drawn from.
        images: (N, C, S, S) preprocessed images; or a directory of image files, which the model's preprocessor reads.
        options: Of `Calibration`, except for `window` and `prefix`: a window is an image. Numbers of tokens are rounded
            to whole images.
        gradient_tokens: On this number of tokens gradients are measured.

    Raises:
        UsageError: If the images are not the model's, or an option is for texts.

    Example:
        >>> from ngc_jax.models.vision import make_encoder
        >>> hf = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> vision = make_encoder("tiny", hf | {"intermediate_size": 12, "image_size": 8, "patch_size": 4})
        >>> made = image_calibration(vision, np.zeros((3, 3, 8, 8), np.float32), {}, 16)
        >>> made["window"], len(made["tokens"])
        (5, 15)
    """
    from ngc_jax.evaluation.image_loss import draw_targets, outputs_of
    from ngc_jax.models.vision import VisionModel

    assert isinstance(model, VisionModel)
    for name in ("window", "prefix"):
        if name in options:
            raise UsageError(f"{name} is for texts; leave it out for images")
    pixels = read_images(model, images)
    window = model.encoder_config.tokens_of(*pixels.shape[2:])
    options = {"batch_size": max(_TOKENS_AT_ONCE // window, _LEAST), **options}
    # On these and up to half as many others: on the dense model first, on the compact one again.
    first = gradient_tokens // window + 1
    some = pixels[: first + first // 2 + 2]
    outputs = outputs_of(model.encoder, model.params, some, batch_size=options["batch_size"])
    if not np.isfinite(outputs).all():
        raise UsageError("the outputs for the images are not finite; load the model with --dtype float32")
    drawn = np.asarray(draw_targets(model.encoder, jnp.asarray(outputs), jax.random.key(0)))
    fill: Any = _NO_CLASS if drawn.ndim == 1 else np.nan
    targets = np.full((len(pixels), *drawn.shape[1:]), fill, drawn.dtype)
    targets[: len(drawn)] = drawn
    return {**options, "tokens": ImageStream(Images(pixels, targets), window), "window": window}


def read_images(model: VisionModel, images: Any) -> np.ndarray:
    """Preprocessed images (N, C, S, S), in float32: given as such, or as a directory or a list of files.

    Raises:
        UsageError: If there are none, or they are not the model's.
    """
    if isinstance(images, str | Path):
        images = image_files(images)
    if isinstance(images, list | tuple) and images and all(isinstance(one, str | Path) for one in images):
        images = model.preprocessor.load(images)
    return check_pixels(images, model.config)
