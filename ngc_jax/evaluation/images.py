"""Top-1 accuracy of an image classifier on labelled images.

Legend: N images, C channels, S height and width.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.image_loss import outputs_of
from ngc_jax.evaluation.scores import wilson_interval
from ngc_jax.models.images import check_pixels
from ngc_jax.models.preprocessing import image_files
from ngc_jax.models.vision import VisionModel

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy.

    Attributes:
        correct: Images of which the class is the most likely one.
        images: All images.
        loss: Mean cross-entropy, in nats.
        seconds: Time that the images took.

    Example:
        >>> score = Accuracy(81, 263, 1.2, 3.0)
        >>> round(score.accuracy, 3), [round(bound, 3) for bound in score.interval]
        (0.308, [0.255, 0.366])
    """

    correct: int
    images: int
    loss: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of correct images."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the share."""
        return wilson_interval(self.correct, self.images)


def evaluate_images(
    model: Any,
    images: Any,
    labels: Int[np.ndarray, " N"],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Measure the top-1 accuracy of a classifier.

    Args:
        model: Dense or compact, with a classifier.
        images: (N, C, S, S) preprocessed images; or a list of files, which the model's preprocessor reads in batches.
        labels: (N,) the number of each image's class.
        batch_size: Images that run at once.
        progress: Called with (images done, total).

    Raises:
        UsageError: If the model has no classifier, or images or labels are not its own.

    Example:
        >>> from ngc_jax.models.vision import make_encoder
        >>> hf = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> vision = make_encoder("tiny", hf | {"intermediate_size": 12, "image_size": 8, "patch_size": 4})
        >>> evaluate_images(vision, np.ones((3, 3, 8, 8), np.float32), np.array([0, 0, 0])).images
        3
    """
    check_classifier(model)
    classes = model.config.vocab_size
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels):
        raise UsageError(
            f"labels are of shape {labels.shape}; expected a whole number for each of {len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(f"labels are {labels.min()} to {labels.max()}; the model has the classes 0 to {classes - 1}")
    started, correct, loss = time.perf_counter(), 0, 0.0
    for start in range(0, len(images), batch_size):
        chosen = slice(start, start + batch_size)
        some = images[chosen]
        pixels = model.preprocessor.load(some) if isinstance(some, list) else some
        pixels, right = check_pixels(pixels, model.config), labels[chosen]
        logits = outputs_of(model.encoder, model.params, pixels, batch_size=batch_size).astype(np.float64)
        correct += int((logits.argmax(axis=-1) == right).sum())
        highest = logits.max(axis=-1, keepdims=True)
        totals = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
        loss += float((totals - np.take_along_axis(logits, right[:, None], axis=-1)[:, 0]).sum())
        if progress is not None:
            progress(min(start + batch_size, len(images)), len(images))
    return Accuracy(correct, len(images), loss / len(images), time.perf_counter() - started)


def check_classifier(model: Any) -> None:
    """Refuse a model that does not classify images.

    Raises:
        UsageError: If it is no image encoder, or has no classifier.
    """
    if not isinstance(model, VisionModel):
        raise UsageError(f"{model.name} is a language model, which does not classify images; give it a text or a task")
    if model.encoder_config.head != "classes":
        raise UsageError(
            f"{model.name} has no classifier, and zero-shot classification is not supported; give a model such as "
            "ViTForImageClassification"
        )


def labelled_files(directory: str | Path, labels: Sequence[str]) -> tuple[list[Path], Int[np.ndarray, " N"]]:
    """Image files in sub-folders named by class, and the number of each one's class.

    A folder's name is that of a class, or its number. Where none is, and there is one folder for each class, their
    alphabetical order is taken for the classes' order, with a warning.

    Args:
        directory: With a sub-folder for each class.
        labels: The model's names of classes.

    Raises:
        UsageError: If there are no sub-folders with images, or they are not the model's classes.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give one with a sub-folder of images for each class")
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UsageError(f"{directory}: has no sub-folders; expected one for each class, with its images")
    classes = {str(number): number for number in range(len(labels))} | {
        name: number for number, name in enumerate(labels) if labels.count(name) == 1
    }
    known = [folder for folder in folders if folder.name in classes]
    if not known and len(folders) == len(labels):
        _LOG.warning("the sub-folders of %s are taken for the model's classes in alphabetical order", directory)
        classes |= {folder.name: number for number, folder in enumerate(folders)}
    elif len(known) < len(folders):
        strange = next(folder for folder in folders if folder.name not in classes)
        some = ", ".join(labels[:4])
        raise UsageError(
            f"{strange}: is not named after a class of the model ({some}{', …' if len(labels) > 4 else ''}); name "
            f"sub-folders by classes, or by their numbers from 0 to {len(labels) - 1}"
        )
    files, numbers = [], []
    for folder in folders:
        found = image_files(folder)
        files += found
        numbers += [classes[folder.name]] * len(found)
    return files, np.asarray(numbers)
