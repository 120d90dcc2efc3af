"""A plain Hugging Face directory, which transformers, vLLM and all other tools load without our code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.exporting.folded import DTYPES, FoldedSource, cast
from ngc_jax.files import atomic_directory, os_errors
from ngc_jax.models.card import front_matter, hub_id, render_card
from ngc_jax.models.fused import FusedTensors
from ngc_jax.models.keys import hf_name
from ngc_jax.models.save import SHARD_BYTES
from ngc_jax.models.sources import Source


def export_huggingface(
    source: Source,
    directory: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a model, dense or compact, as its plain dense architecture.

    Memory holds one shard and one group at a time.

    Args:
        source: The model, from `models.sources.open_source`.
        directory: Where to write it, atomically.
        dtype: float32, float16 or bfloat16; of the source's embedding if None.
        shard_bytes: Maximum size of a file of several tensors.
        overwrite: Replace an existing model directory.
        progress: Called with (tensors written, total).

    Returns:
        A summary: directory, dtype, parameters, bytes of the tensors, and whether groups were folded.

    Raises:
        UsageError: If the model cannot be read or has no plain form, the type is unknown or too small for its
            numbers, or the directory cannot be written.

    Example:
        >>> from ngc_jax import save_model
        >>> from ngc_jax.models.sources import open_source
        >>> with open_source(str(save_model(compact, "for-transformers"))) as source:
        ...     export_huggingface(source, "plain")["folded"]
        True
    """
    folded = FoldedSource(source)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    own = FusedTensors(folded, folded.decoder_config)
    embedding = folded.read(hf_name("embed.embedding", folded.decoder_config))
    kind = DTYPES[dtype] if dtype is not None else embedding.dtype
    del embedding
    config = {**folded.config, "dtype": str(kind), "torch_dtype": str(kind)}
    with atomic_directory(directory, overwrite) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        folded.tokenizer().save(temporary)
        with os_errors(Path(directory)):
            sizes = write_shards(own, temporary, kind, shard_bytes, progress)
        (temporary / "README.md").write_text(_card(Path(directory).absolute().name, folded), encoding="utf-8")
    return {
        "out": str(directory),
        "dtype": str(kind),
        "folded": folded.compact,
        "parameters": sum(int(np.prod(shape)) for shape in folded.shapes.values()),
        "bytes": sum(sizes),
    }


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""

    def read(self, name: str) -> np.ndarray:
        """One tensor."""


def write_shards(
    source: Tensors,
    directory: Path,
    dtype: np.dtype,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> list[int]:
    """Write the tensors in one file, or in several with an index; returns the files' sizes."""
    shards = list(_shards(source, dtype.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = source.read(name)
            tensors[name] = cast(tensor, dtype, name) if tensor.dtype != np.int64 else tensor
            done += 1
            if progress is not None:
                progress(done, len(source.shapes))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = dtype.itemsize * sum(int(np.prod(shape)) for shape in source.shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [file.stat().st_size for file in sorted(directory.glob("*.safetensors"))]


def _shards(source: Tensors, itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in source.shapes.items():
        n_bytes = itemsize * int(np.prod(shape))
        if names and size + n_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += n_bytes
    yield names


def _card(name: str, folded: FoldedSource) -> str:
    conversion = folded.conversion or {}
    source = str(conversion.get("source") or folded.name)
    base = conversion["base_model"] if "base_model" in conversion else hub_id(source)
    what = "Its neuronal groups are folded into dense weights." if folded.compact else "Its weights are dense."
    text = f"Exported by ngc-jax from {folded.name}. {what}"
    licence = "The weights keep the licence of the model they were made from."
    return render_card(front_matter(folded.license, base, plain=True), [f"# {name}", f"{text} {licence}"])
