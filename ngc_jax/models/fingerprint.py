"""Detect whether a model's files have changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ngc_jax.models.sources import Source

_SAMPLES, _SAMPLE_BYTES = 32, 1 << 16


def fingerprint(source: Source) -> str:
    """A digest of a model's config.json and of samples of its weight files, independent of where the files are.

    Of each file, its size and 32 samples of 64 KiB spread evenly over it: all of a small file, and a small part of a
    large one. A model that was converted or trained again differs everywhere; a single edited number in a large file
    may not be noticed.

    Args:
        source: An open model.
    """
    digest = hashlib.blake2b(json.dumps(source.config, sort_keys=True, default=str).encode(), digest_size=16)
    for path in source.files:
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest.update(f"{size}\n".encode())
        step = max(size // _SAMPLES, _SAMPLE_BYTES)
        for start in sorted({*range(0, size, step), max(size - _SAMPLE_BYTES, 0)}):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
