"""A GGUF model on disk, in one file or split into several: metadata, its tensors one at a time."""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing
from ngc_jax.models.gguf.header import Header, TensorInfo, read_header

_SLAB_NUMBERS = 1 << 22
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(|\.gguf)", re.IGNORECASE)


class GgufFile(Closing):
    """An open GGUF model.

    Attributes:
        path: the file, the first one if it is split.
        metadata: every key of the first file's header with its value as plain Python data.
        tensors: GGUF name -> TensorInfo.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, and its companions if it is split, and reads their headers.

        Raises:
            UsageError: a file cannot be read, is not a GGUF file, is truncated or corrupt, or a companion is
                missing.
        """
        self.path = path
        self._files = ExitStack()
        self._open: dict[Path, BufferedReader] = {}
        try:
            self.metadata: Mapping[str, Any]
            self.metadata, tensors = self._add(path)
            for number, companion in enumerate(_companions(path, self.metadata), start=1):
                header = self._add(companion)
                _check_part(companion, header.metadata, number, self.metadata["split.count"])
                for name, info in header.tensors.items():
                    if name in tensors:
                        raise UsageError(
                            f"{companion}: tensor {name!r} is also in {tensors[name].path.name}; "
                            "download or copy all files again"
                        )
                    tensors[name] = info
            expected = self.metadata.get("split.tensors.count", len(tensors))
            if expected != len(tensors):
                raise UsageError(
                    f"{path}: has {len(tensors)} tensors in all its parts, expected {expected}; "
                    "download or copy all files again"
                )
            self.tensors: Mapping[str, TensorInfo] = tensors
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the model."""
        return tuple(self._open)

    def _add(self, path: Path) -> Header:
        try:
            self._open[path] = self._files.enter_context(path.open("rb"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
        return read_header(self._open[path], path)

    def read(self, name: str) -> np.ndarray:
        """Reads and dequantises one tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            The tensor as float32 in its `shape`.

        Raises:
            UsageError: its type cannot be dequantised, or the file has shrunk since it was opened.
        """
        info = self.tensors[name]
        self.check_type(name)
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        file = self._open[info.path]
        file.seek(info.offset)
        tensor = np.empty((math.prod(info.shape[:-1]), info.shape[-1]), np.float32)
        # In slabs of rows: dequantising needs temporary memory as large as its result.
        step = max(1, _SLAB_NUMBERS // info.shape[-1])
        for rows in (tensor[start : start + step] for start in range(0, len(tensor), step)):
            stored = np.empty((len(rows), info.shape[-1] // block * block_bytes), np.uint8)
            if file.readinto(stored.reshape(-1).data) != stored.nbytes:
                raise UsageError(f"{info.path}: ends inside tensor {name!r}; download or copy the file again")
            rows[:] = dequantize(stored, info.type)
        return tensor.reshape(info.shape)

    def check_type(self, name: str) -> None:
        """Checks that a tensor can be dequantised.

        Raises:
            UsageError: it cannot.
        """
        info = self.tensors[name]
        if not _can_dequantise(info.type):
            raise UsageError(
                f"{info.path}: tensor {name!r} has type {info.type.name}, which cannot be dequantised; "
                "requantise the file to a common type such as Q8_0 or F16"
            )

    def close(self) -> None:
        """Closes the files; `metadata` and `tensors` stay readable."""
        self._files.close()


@lru_cache
def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    # The gguf package has no list of supported types: try one.
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _companions(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The other files of a split model, in order; none for a model in one file."""
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return []
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or not isinstance(count, int) or int(match[3]) != count or count > 99_999:
        raise UsageError(
            f"{path}: is one of {count} files of a split model, but not named NAME-00001-of-0000N.gguf; "
            "give it and its companions their original names"
        )
    names = [f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(1, count + 1)]
    if path.name != names[0]:
        raise UsageError(f"{path}: is a later part of a split model; give the first, {path.with_name(names[0])}")
    paths = [path.with_name(name) for name in names[1:]]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise UsageError(
            f"{path}: {len(missing)} of its {count} parts are not there, first {missing[0]}; "
            "download or copy them as well"
        )
    return paths


def _check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Refuses a part whose metadata contradicts its name."""
    says = metadata.get("split.no", number), metadata.get("split.count", count)
    if says != (number, count):
        raise UsageError(
            f"{path}: is part {number + 1} of {count} by its name, but not by its metadata (split.no {says[0]!r}, "
            f"split.count {says[1]!r}); download or copy all files again"
        )
