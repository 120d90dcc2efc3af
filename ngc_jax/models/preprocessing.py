"""Preprocessing of images as preprocessor_config.json describes it: resize, crop, rescale, normalise.

Legend: C channels, S height and width of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ngc_jax.errors import UsageError
from ngc_jax.lazy import install_advice
from ngc_jax.models.families.reading import brief

if TYPE_CHECKING:
    from PIL.Image import Image

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESAMPLING = (0, 1, 2, 3, 4, 5)
_BILINEAR, _BICUBIC = 2, 3
# The size that the processors' own settings are for.
_USUAL_SIZE = 224
_KNOWN_SIZES = ("height", "width", "shortest_edge")
# What transformers' processors assume where preprocessor_config.json is silent, by model.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {"image_mean": _HALF, "image_std": _HALF, "resample": _BILINEAR},
    "deit": {
        "size": {"height": 256, "width": 256},
        "crop_size": 224,
        "do_center_crop": True,
        "image_mean": _HALF,
        "image_std": _HALF,
        "resample": _BICUBIC,
    },
    "siglip_vision_model": {"image_mean": _HALF, "image_std": _HALF, "resample": _BICUBIC},
    "clip_vision_model": {
        "size": {"shortest_edge": 224},
        "crop_size": 224,
        "do_center_crop": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "resample": _BICUBIC,
    },
}
_DINO = {
    "size": {"shortest_edge": 256},
    "crop_size": 224,
    "do_center_crop": True,
    "image_mean": _IMAGENET_MEAN,
    "image_std": _IMAGENET_STD,
    "resample": _BICUBIC,
}
_DEFAULTS |= {"dinov2": _DINO, "dinov2_with_registers": _DINO}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """How an image becomes a model's input.

    Attributes:
        size: (height, width) to resize to; (edge,) for the shorter edge, with the proportions kept; None for no resize.
        resample: Pillow's number of the filter.
        crop: (height, width) of the centre that is kept, with zeros around a smaller image; None for all.
        rescale: Factor of pixels, which are 0 to 255.
        mean: Of each channel, subtracted after that; None for no normalisation.
        std: Of each channel.
        channels: 3, or 1 for grey images.

    Example:
        >>> from PIL import Image
        >>> Preprocessor((4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)(Image.new("RGB", (9, 7), "white"))[0, 0]
        array([1., 1., 1., 1.], dtype=float32)
    """

    size: tuple[int, ...] | None
    resample: int = _BILINEAR
    crop: tuple[int, int] | None = None
    rescale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int = 3

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], model_type: str, image_size: int, channels: int = 3) -> Preprocessor:
        """Read the dictionary of a preprocessor_config.json; an empty one stands for the defaults of the family.

        Args:
            hf: The file.
            model_type: Of the model's config.json.
            image_size: The model's, for a file and a family that name none.
            channels: The model's.

        Raises:
            UsageError: If a setting is invalid or not supported.
        """
        if channels not in (1, 3):
            raise UsageError(f"images of {channels} channels are not supported; give preprocessed arrays")
        whole = {"size": image_size, **_DEFAULTS.get(model_type, {}), **hf}
        if not hf and image_size != _USUAL_SIZE:
            whole |= {"size": image_size, "do_center_crop": False}
        resample = whole.get("resample", _BILINEAR)
        if resample not in _RESAMPLING:
            raise UsageError(f"resample in preprocessor_config.json is {brief(resample)}; expected 0 to 5")
        shorter = not whole.get("default_to_square", True) if isinstance(whole["size"], int) else False
        made = {
            "size": _size(whole, "size", shorter=shorter) if whole.get("do_resize", True) else None,
            "resample": resample,
            "crop": _pair(_size(whole, "crop_size")) if whole.get("do_center_crop", False) else None,
            "rescale": _number(whole, "rescale_factor", 1 / 255) if whole.get("do_rescale", True) else 1.0,
            "channels": channels,
        }
        if whole.get("do_normalize", True):
            made |= {field: _channels(whole, f"image_{field}", channels) for field in ("mean", "std")}
            if not all(made["std"]):
                raise UsageError("image_std in preprocessor_config.json has a zero; expected positive numbers")
        return cls(**made)

    def __call__(self, image: Image) -> Float[np.ndarray, "C S S"]:
        """The model's input for one image of Pillow's, in float32."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            image = image.resize(_target(image.size, self.size), resample=self.resample)
        array: np.ndarray = np.asarray(image, np.float32).reshape(image.height, image.width, self.channels)
        if self.crop is not None:
            array = _centre(array, *self.crop)
        array = array * np.float32(self.rescale)
        if self.mean is not None:
            array = (array - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(array.transpose(2, 0, 1))

    def load(self, files: Sequence[str | Path]) -> Float[np.ndarray, "N C S S"]:
        """The model's inputs for image files.

        Raises:
            UsageError: If Pillow is missing, a file is no image, or the images' sizes differ after all.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ModuleNotFoundError:
            raise UsageError(f"reading images needs {install_advice('PIL')}") from None
        found: list[np.ndarray] = []
        for file in files:
            try:
                with Image.open(file) as image:
                    found.append(self(image))
            except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
                raise UsageError(f"{file}: is not an image that can be read ({type(error).__name__})") from None
            if found[-1].shape != found[0].shape:
                raise UsageError(
                    f"{file} is of {found[-1].shape[1:]} pixels after preprocessing, and the first image of "
                    f"{found[0].shape[1:]}; give a preprocessor_config.json that crops or resizes to one size"
                )
        return np.stack(found)


def _target(size: tuple[int, int], wanted: tuple[int, ...]) -> tuple[int, int]:
    """Width and height to resize to, of an image of this width and height."""
    if len(wanted) == 2:
        return wanted[1], wanted[0]
    width, height = size
    edge = wanted[0]
    short, long = min(width, height), max(width, height)
    other = int(edge * long / short)
    return (edge, other) if width <= height else (other, edge)


def _centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of an image (h, w, C), padded with zeros where it is smaller."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return array[top : top + height, left : left + width]
    more_rows, more_columns = max(height - array.shape[0], 0), max(width - array.shape[1], 0)
    above, before = -(-more_rows // 2), -(-more_columns // 2)
    around = ((above, more_rows - above), (before, more_columns - before), (0, 0))
    return _centre(np.pad(array, around), height, width)


def _size(hf: Mapping[str, Any], name: str, *, shorter: bool = False) -> tuple[int, ...]:
    value = hf.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return (value,) if shorter else (value, value)
    sides = dict(value) if isinstance(value, Mapping) else {}
    if set(sides) <= set(_KNOWN_SIZES) and all(type(side) is int and side > 0 for side in sides.values()):
        if set(sides) == {"height", "width"}:
            return sides["height"], sides["width"]
        if set(sides) == {"shortest_edge"}:
            return (sides["shortest_edge"],)
    raise UsageError(
        f"{name} in preprocessor_config.json is {brief(value)}; expected height and width, or shortest_edge"
    )


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[-1]


def _number(hf: Mapping[str, Any], name: str, default: float) -> float:
    value = hf.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{name} in preprocessor_config.json is {brief(value)}; expected a positive number")
    return float(value)


def _channels(hf: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    value = hf.get(name, _HALF)
    numbers = (
        [value] * channels if isinstance(value, int | float) else list(value) if isinstance(value, list | tuple) else []
    )
    if channels == 1 and len(numbers) == 3:
        numbers = [sum(numbers) / 3]
    if len(numbers) != channels or not all(isinstance(one, int | float) for one in numbers):
        raise UsageError(f"{name} in preprocessor_config.json is {brief(value)}; expected {channels} numbers")
    return tuple(map(float, numbers))


_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_files(directory: str | Path) -> list[Path]:
    """All image files of a directory and those below it, sorted; hidden ones are left out.

    Raises:
        UsageError: If there is no such directory, or it has no images.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give one with images")
    found = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in _ENDINGS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    if not found:
        raise UsageError(f"{directory}: has no images; expected files such as .jpg and .png")
    return found
