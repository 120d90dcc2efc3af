"""Reads a GGUF file: its metadata, its table of tensors, and one tensor at a time.

The header is parsed here rather than through `gguf.GGUFReader`, for three reasons: a vocabulary costs that reader
seconds and one small array per token, it memory-maps the weights (whose pages then count as resident), and a
truncated or corrupt file makes it loop or fail anywhere. Block layouts and dequantisation are the gguf package's.

Format: GGUF specification, versions 2 and 3, little-endian.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

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
    """Where one tensor lies and how it is stored.

    Attributes:
        name: the tensor's GGUF name.
        shape: in NumPy order, slowest dimension first (GGUF lists the fastest first).
        type: how its blocks are quantised.
        offset: its first byte in the file.
        n_bytes: its stored size.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: every key of the header with its value as plain Python data.
        tensors: GGUF name -> TensorInfo.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            UsageError: the file cannot be read, is no GGUF file, is of an unknown version, truncated or corrupt.
        """
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise UsageError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
        try:
            cursor = _Cursor(self._file, path)
            n_tensors, n_keys = _read_preamble(cursor)
            self.metadata: Mapping[str, Any] = _read_metadata(cursor, n_keys)
            self.tensors: Mapping[str, TensorInfo] = _read_tensor_table(cursor, n_tensors, self.metadata)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """Reads and dequantises one tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            The tensor as float32 in its `shape`.

        Raises:
            UsageError: the tensor's type cannot be dequantised, or the file has shrunk since it was opened.
        """
        info = self.tensors[name]
        if not can_dequantise(info.type):
            raise UsageError(
                f"{self.path}: tensor {name} has type {info.type.name}, which cannot be dequantised here; "
                "requantise the file to a common type such as Q8_0 or F16"
            )
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        stored = np.empty((*info.shape[:-1], info.shape[-1] // block * block_bytes), np.uint8)
        self._file.seek(info.offset)
        if self._file.readinto(stored.reshape(-1).data) != info.n_bytes:
            raise UsageError(f"{self.path}: ends inside tensor {name}; download or copy the file again")
        return np.asarray(dequantize(stored, info.type), np.float32).reshape(info.shape)

    def close(self) -> None:
        """Closes the file; `metadata` and `tensors` stay readable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@lru_cache
def can_dequantise(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package can turn blocks of this type into float32."""
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Cursor:
    """Walks through the header and refuses to pass the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self.position = 0

    def corrupt(self, what: str) -> UsageError:
        return UsageError(f"{self.path}: corrupt GGUF file: {what}; download or copy the file again")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.size - self.position:
            raise UsageError(
                f"{self.path}: GGUF file is truncated: its header ends at byte {self.size}; "
                "download or copy the file again"
            )
        self.position += n_bytes
        return self._file.read(n_bytes)

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        start = self.position
        try:
            return self.take(self.scalar("<Q")).decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"the text at byte {start} is not UTF-8") from None

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
            f"{cursor.path}: not a GGUF file (it does not begin with the bytes GGUF); check the path"
        )
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        hint = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise UsageError(
            f"{cursor.path}: GGUF {hint} is not supported, expected little-endian version 2 or 3; "
            "convert the model again with a current converter"
        )
    return cursor.scalar("<Q"), cursor.scalar("<Q")


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.corrupt(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    return metadata


def _read_tensor_table(cursor: _Cursor, n_tensors: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    rows = [_read_tensor_row(cursor) for _ in _bounded(cursor, n_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {alignment!r}, expected a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, raw_type, offset in rows:
        info = _locate(cursor, name, shape, raw_type, data_start + offset)
        if name in tensors:
            raise cursor.corrupt(f"tensor {name!r} occurs twice")
        tensors[name] = info
    return tensors


def _bounded(cursor: _Cursor, count: int) -> range:
    # The smallest row takes 24 bytes; a count beyond that is nonsense and range() cannot hold any uint64.
    if count > cursor.size // 24:
        raise cursor.corrupt(f"it claims {count} tensors")
    return range(count)


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
            f"{cursor.path}: tensor {name} has the unknown type number {raw_type}; "
            "requantise the file to a common type such as Q8_0 or F16"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.corrupt(f"tensor {name!r} of shape {shape} is no whole number of {kind.name} blocks")
    n_bytes = math.prod(shape) // block * block_bytes
    if offset + n_bytes > cursor.size:
        raise UsageError(
            f"{cursor.path}: GGUF file is truncated: tensor {name} ends at byte {offset + n_bytes}, the file at "
            f"byte {cursor.size}; download or copy the file again"
        )
    return TensorInfo(name, shape, kind, offset, n_bytes)
