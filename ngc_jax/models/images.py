"""Images as a model measures them: a stream in which every image has the same number of tokens.

Legend: N images, B images of a batch, C channels, S height and width, L tokens of an image, V outputs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig


class Images(NamedTuple):
    """Images and what the outputs for them are compared with.

    Attributes:
        pixels: (..., C, S, S), float32, preprocessed.
        targets: (...) int32 classes, or (..., V) float32 outputs.
    """

    pixels: Any
    targets: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ImageStream:
    """Images in the place of a stream of tokens: its length is that of all tokens, and slices are whole images.

    Attributes:
        images: Of (N, ...), NumPy arrays.
        tokens_per_image: L.

    Example:
        >>> stream = ImageStream(Images(np.zeros((6, 3, 8, 8), np.float32), np.zeros(6, np.int32)), 5)
        >>> len(stream), len(stream[:12]), len(stream[25:])
        (30, 10, 5)
    """

    images: Images
    tokens_per_image: int

    @property
    def count(self) -> int:
        """N."""
        return len(self.images.pixels)

    def __len__(self) -> int:
        return self.count * self.tokens_per_image

    def __getitem__(self, part: slice) -> ImageStream:
        """Whole images, rounded down; at least one, unless the slice is empty."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a stream of images has no slices with a step")
        length = self.tokens_per_image
        first = min(start // length, self.count)
        count = max((stop - start) // length, 1) if stop > start else 0
        chosen = slice(first, first + count)
        return dataclasses.replace(self, images=Images(self.images.pixels[chosen], self.images.targets[chosen]))

    def batches(self, batch_size: int) -> list[tuple[Images, np.ndarray]]:
        """Batches of images and the positions (B, L) of their tokens: 0, so that all see each other; -1 for padding."""
        found = []
        for start in range(0, self.count, batch_size):
            some = [np.asarray(array[start : start + batch_size]) for array in self.images]
            missing = batch_size - len(some[0])
            padded = [np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) for array in some]
            positions = np.zeros((batch_size, self.tokens_per_image), np.int32)
            positions[batch_size - missing :] = -1
            found.append((Images(*padded), positions))
        return found


def check_stream(tokens: Any, config: DecoderConfig) -> ImageStream:
    """A stream of images for an image encoder.

    Raises:
        UsageError: If it is none, or the model is not an image encoder.
    """
    if config.causal:
        raise UsageError(f"{config.architecture} is a language model, and images were given; give a text")
    if not isinstance(tokens, ImageStream):
        raise UsageError(f"{config.architecture} is an image encoder, and no images were given; give images")
    return tokens


def check_pixels(pixels: Any, config: Any) -> Float[np.ndarray, "N C S S"]:
    """Preprocessed images of an image encoder's size, in float32.

    Args:
        pixels: (N, C, S, S) finite numbers.
        config: Of the model, an `EncoderConfig`.

    Raises:
        UsageError: If they are not.
    """
    array = np.asarray(pixels)
    if array.ndim != 4 or array.shape[1] != config.channels or array.dtype.kind not in "fiub":
        raise UsageError(
            f"images are of shape {array.shape} and type {array.dtype}; expected numbers of shape "
            f"(N, {config.channels}, height, width), as the model's preprocessor returns them"
        )
    if array.dtype.kind in "iub":
        raise UsageError("images are whole numbers; expected preprocessed ones, in float32")
    if not len(array):
        raise UsageError("there are no images; give at least one")
    config.tokens_of(*array.shape[2:])
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UsageError("images have numbers that are not finite; check how they were preprocessed")
    return array
