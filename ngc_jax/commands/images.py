"""Conversion and evaluation of image encoders, for `ngc-jax convert --images` and `ngc-jax evaluate --images`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.commands.convert import ConvertConfig
    from ngc_jax.commands.evaluate import EvaluateConfig

# Default number of images to calibrate on, unless the directory has fewer: 65,536 tokens of a ViT of 197 tokens.
IMAGES = 332
OF_TEXTS = ("text", "calibration_tokens", "skip_tokens", "window", "bos", "tokenizer")
"""Options that have no meaning for images."""


def refuse_options(config: Any, names: tuple[str, ...]) -> None:
    """Refuse options of texts that were given together with images.

    Raises:
        UsageError: If one of them differs from its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if name in defaults and getattr(config, name) != defaults[name]:
            raise UsageError(f"--{name.replace('_', '-')} is for texts; leave it out with --images")


def convert_encoder(config: ConvertConfig) -> dict[str, Any]:
    """Convert an image encoder and save it; returns the summary.

    Raises:
        UsageError: If any input is invalid; before the weights are read where possible.
    """
    from ngc_jax.commands.console import progress_bar
    from ngc_jax.commands.conversion_options import recipe_of
    from ngc_jax.commands.converted import save_converted
    from ngc_jax.conversion.pipeline import check_conversion, convert
    from ngc_jax.conversion.state import Calibration
    from ngc_jax.files import check_output
    from ngc_jax.models.card import hub_id
    from ngc_jax.models.encoder_config import EncoderConfig
    from ngc_jax.models.families.encoders import encoder_config_json
    from ngc_jax.models.load import load_from_source
    from ngc_jax.models.preprocessing import image_files
    from ngc_jax.models.save import in_dtype, storage_dtype
    from ngc_jax.models.saved_config import split_config
    from ngc_jax.models.sources import open_source
    from ngc_jax.models.vision import VisionModel

    started = time.perf_counter()
    assert config.out is not None
    assert config.images is not None
    check_output(config.out, config.overwrite)
    refuse_options(config, OF_TEXTS)
    if config.devices != 1:
        raise UsageError("--devices is for language models; leave it out with --images")
    recipe = recipe_of(config)
    files = spread(image_files(config.images), config.image_count or IMAGES, exact=config.image_count is not None)
    with open_source(config.model) as source:
        hf_config, section = split_config(source.config, config.model)
        if section is not None and "plan" in section:
            raise UsageError(f"{config.model} is a compact model already; convert the dense model it was made from")
        check_conversion(EncoderConfig.from_hf(encoder_config_json(hf_config)), recipe.chain, recipe.keep)
        stored = config.store_dtype or storage_dtype(source)
        with progress_bar("load") as bar:
            dense = load_from_source(source, dtype=config.dtype, progress=bar)
    assert isinstance(dense, VisionModel)
    pixels, dense_parameters = dense.preprocessor.load(files), dense.count_parameters()
    with progress_bar() as bar:
        calibration = Calibration.of(
            dense,
            pixels,
            gradient_tokens=config.gradient_tokens,
            propagation_tokens=config.propagation_tokens,
            layers_per_pass=config.layers_per_pass,
            **_batch_size(config),
        )
        compact = convert(
            dense, recipe, calibration, donate=True, progress=lambda stage, done, total: bar(done, total, stage)
        )
    details = {
        "method": config.method,
        "keep": config.keep if config.rank is None and recipe.method != "dense" else None,
        **recipe.chain.options(),
        "passes": [one.name for one in recipe.chain],
        "source": config.model,
        "base_model": hub_id(config.model),
        "calibration": {
            "images": f"{len(files)} images of {Path(config.images).name}",
            "tokens": len(calibration.tokens),
        },
    }
    compact = in_dtype(dataclasses.replace(compact, conversion=details), stored)
    return save_converted(config, compact, dense_parameters, started)


def _batch_size(config: Any) -> dict[str, Any]:
    """The batch size where the user gives one: its default is for texts."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == "batch_size")
    return {} if config.batch_size == default else {"batch_size": config.batch_size}


def spread(files: list[Path], count: int, *, exact: bool = False) -> list[Path]:
    """Some of the files, at equal distances, so that every sub-folder has its share.

    Args:
        files: All files, sorted.
        count: Number to choose; all if there are fewer.
        exact: Refuse fewer.

    Raises:
        UsageError: If there are fewer, and `exact`.

    Example:
        >>> spread(list("abcdef"), 3)
        ['a', 'c', 'e']
    """
    if exact and len(files) < count:
        raise UsageError(f"--image-count is {count}, and there are {len(files)} images; ask for at most that many")
    count = min(count, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def evaluate_encoder(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the accuracy of an image classifier; returns the summary.

    Raises:
        UsageError: If any input is invalid.
    """
    from ngc_jax.commands.console import console, progress_bar
    from ngc_jax.evaluation.images import check_classifier, evaluate_images, labelled_files
    from ngc_jax.models.load import load_model

    assert config.images is not None
    refuse_options(config, (*OF_TEXTS, "max_tokens"))
    with progress_bar("load") as bar:
        model: Any = load_model(config.model, dtype=config.dtype, param_dtype=config.param_dtype, progress=bar)
    check_classifier(model)
    files, labels = labelled_files(config.images, model.labels)
    if config.limit is not None:
        chosen = [index * len(files) // min(config.limit, len(files)) for index in range(min(config.limit, len(files)))]
        files, labels = [files[index] for index in chosen], labels[chosen]
    with progress_bar("evaluate") as bar:
        result = evaluate_images(model, files, labels, batch_size=config.batch_size, progress=bar)
    low, high = result.interval
    summary = {
        "model": config.model,
        "images": config.images,
        "count": result.images,
        "correct": result.correct,
        "accuracy": result.accuracy,
        "interval": [low, high],
        "loss": result.loss,
        "parameters": model.count_parameters(),
        "seconds": result.seconds,
    }
    console.print(
        f"accuracy {result.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}), loss {result.loss:.4f} over "
        f"{result.images:,} images ({summary['parameters']:,} parameters, "
        f"{result.images / result.seconds:,.0f} images/s)"
    )
    return summary
