"""Save a model as a directory: config.json, safetensors, tokenizer and a model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.keys import hf_name
from ngc_jax.models.load import LanguageModel

SHARD_BYTES = 5 * 10**9
FORMAT_VERSION = 1


def check_output(directory: str | Path, overwrite: bool) -> Path:
    """Refuse an output directory that must not be written, before any work is done.

    Raises:
        UsageError: If it exists and `overwrite` is false, or is not a directory of a model, or has no parent.
    """
    directory = Path(directory)
    if directory.exists() or directory.is_symlink():
        if not overwrite:
            raise UsageError(f"{directory} exists; choose another --out or add --overwrite")
        if not directory.is_dir() or (any(directory.iterdir()) and not (directory / "config.json").exists()):
            raise UsageError(
                f"{directory} is not a model directory and will not be overwritten; choose another --out"
            )
    ancestor = next(parent for parent in directory.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UsageError(f"{directory} cannot be made in {ancestor}; choose an --out that can be written")
    return directory


@contextmanager
def atomic_directory(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place on success and vanishes on failure."""
    check_output(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
            directory.rename(old / "model")
            temporary.rename(directory)
            shutil.rmtree(old)
        else:
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(
    model: LanguageModel,
    directory: str | Path,
    *,
    overwrite: bool = False,
    conversion: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Write a model so that `load_model` reads it back bit for bit.

    Args:
        model: The model.
        directory: Where; made whole or not at all.
        overwrite: Replace an existing model directory.
        conversion: How it was made, kept in our section of config.json; the model's own if None.
        card: Text of README.md; a short one is made if None.

    Returns:
        The directory.

    Raises:
        UsageError: See `check_output`.
    """
    directory = Path(directory)
    with atomic_directory(directory, overwrite) as temporary:
        hf_config = dict(model.hf_config)
        hf_config["torch_dtype"] = hf_config["dtype"] = str(np.dtype(model.dtype))
        if model.plan is not None:
            details = model.conversion if conversion is None else conversion
            hf_config["ngc"] = {"format": FORMAT_VERSION, **(details or {}), "plan": model.plan.to_json()}
        _write_text(temporary / "config.json", json.dumps(hf_config, indent=2) + "\n")
        _save_tensors(model, temporary)
        model.load_tokenizer().save(temporary)
        _write_text(
            temporary / "README.md", card or f"# {directory.name}\n\nMade from {model.name} by ngc-jax.\n"
        )
    return directory


def tensor_bytes(directory: Path) -> int:
    """Bytes on disk of a model directory's tensors."""
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def _save_tensors(model: LanguageModel, directory: Path) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for path, leaf in traverse_util.flatten_dict(model.params).items():
        tensor = np.asarray(leaf)
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][hf_name(".".join(path), model.config)] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "np"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "np"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
