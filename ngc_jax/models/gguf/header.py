"""Parses the header of a GGUF file: its metadata and the table of its tensors.

Not done through `gguf.GGUFReader`: that takes seconds for a vocabulary, with several small arrays per token;
it maps the weights into memory; and it loops or fails anywhere on a corrupt file. Here every length is
checked against the file before it is used. Format: GGUF specification, versions 2 and 3, little-endian.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ngc_jax.errors import UsageError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 3

_STRING, _ARRAY = 8, 9
# value type -> (struct code, NumPy dtype)
_SCALARS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """The location and storage type of one tensor.

    Attributes:
        path: the file that holds it.
        shape: in NumPy order, slowest dimension first (GGUF lists the fastest first).
        type: how its blocks are quantised.
        offset: its first byte in the file.
        n_bytes: its stored size.
    """

    path: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


class Header(NamedTuple):
    """The part before the weights: metadata as plain Python data, and GGUF tensor name -> TensorInfo.

    Bytes of a text that are not UTF-8 become lone surrogates, as with `errors="surrogateescape"`.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether a file begins with the bytes GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_header(file: BinaryIO, path: Path) -> Header:
    """Reads the header of an open file.

    Args:
        file: open for reading, at any position.
        path: its path, for messages and for the TensorInfo.

    Raises:
        UsageError: it is not a GGUF file, of an unsupported version or byte order, truncated or corrupt.
    """
    cursor = _Cursor(file, path)
    n_tensors, n_keys = _read_preamble(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.corrupt(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    return Header(metadata, _read_tensor_table(cursor, n_tensors, metadata))


class _Cursor:
    """Reads through the header and refuses to pass the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self.position = 0

    def corrupt(self, what: str) -> UsageError:
        return UsageError(f"{self.path}: corrupt GGUF file: {what}; download or copy the file again")

    def truncated(self, what: str) -> UsageError:
        return UsageError(
            f"{self.path}: truncated GGUF file: {what} goes past its last byte, {self.size}; "
            "download or copy the file again"
        )

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.size - self.position:
            raise self.truncated(f"the header at byte {self.position}")
        self.position += n_bytes
        return self._file.read(n_bytes)

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        # A description in another encoding does no harm. Where a text is needed, its lone surrogates are refused.
        return self.take(self.scalar("<Q")).decode(errors="surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind][0])
        if kind != _ARRAY or depth == _MAX_ARRAY_DEPTH:
            raise self.corrupt(f"value of unknown type {kind} at byte {self.position}")
        item, length = self.scalar("<I"), self.scalar("<Q")
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item][1])
            return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
        return [self.value(item, depth + 1) for _ in range(length)]


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Returns the numbers of tensors and of metadata keys."""
    if cursor.size < len(_MAGIC) or cursor.take(len(_MAGIC)) != _MAGIC:
        raise UsageError(
            f"{cursor.path}: not a GGUF file, which begins with the bytes GGUF; download or copy the file again"
        )
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        what = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise UsageError(
            f"{cursor.path}: {what} is not supported, expected little-endian version 2 or 3; "
            "convert the model again with a current converter"
        )
    return cursor.scalar("<Q"), cursor.scalar("<Q")


def _read_tensor_table(cursor: _Cursor, n_tensors: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    rows = [_read_tensor_row(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {alignment!r}, expected a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, raw_type, offset in rows:
        if name in tensors:
            raise cursor.corrupt(f"tensor {name!r} occurs twice")
        tensors[name] = _locate(cursor, name, shape, raw_type, data_start + offset)
    return tensors


def _read_tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.string(), cursor.scalar("<I")
    if not 0 < n_dims <= _MAX_DIMS:
        raise cursor.corrupt(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(n_dims))[::-1]
    return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")


def _locate(cursor: _Cursor, name: str, shape: tuple[int, ...], raw_type: int, offset: int) -> TensorInfo:
    try:
        kind = GGMLQuantizationType(raw_type)
    except ValueError:
        raise UsageError(
            f"{cursor.path}: tensor {name!r} is stored in the unknown type number {raw_type}; "
            "requantise the file to a common type such as Q8_0 or F16"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.corrupt(f"tensor {name!r} of shape {shape} is not a whole number of {kind.name} blocks")
    n_bytes = math.prod(shape) // block * block_bytes
    if offset + n_bytes > cursor.size:
        raise cursor.truncated(f"tensor {name!r}")
    return TensorInfo(cursor.path, shape, kind, offset, n_bytes)
