"""Reads a Hugging Face model directory: config.json, one or many safetensors files, tokenizer files.

The safetensors header (a length, then JSON) is parsed here: the library's NumPy reader does not know bfloat16
and float8, and maps whole files into memory. One tensor is read at a time, so memory holds that tensor only.
"""

import dataclasses
import logging
import math
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing, parse_json
from ngc_jax.groups.quantised import QuantisedMatrix
from ngc_jax.models.families.encoders import is_encoder
from ngc_jax.models.fused import Rows, fused_rows
from ngc_jax.models.quantised import dequantise, find_scales, has_bare_float8
from ngc_jax.models.quantised_tensors import PARTS, find_quantised, whole_groups
from ngc_jax.models.saved_config import SECTION, split_config
from ngc_jax.models.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER = 100_000_000  # the format's own limit
_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int
    # Of a matrix that is not one piece of a fused tensor: the tensor, and the matrix's rows in it.
    inside: "tuple[_Entry, Rows] | None" = None


class SafetensorsSource(Closing):
    """A model directory as a source of a model (see `sources.Source`)."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        """Reads config.json and the headers of all weight files.

        Args:
            directory: the model directory.
            name: how to call the model; the directory's name by default.

        Raises:
            UsageError: config.json or weights are missing, damaged, or only there as pickle files.
        """
        self.name = name or directory.resolve().name
        self._directory = directory
        self.config: dict[str, Any] = _read_config(directory)
        self._files = ExitStack()
        self._open: dict[Path, BufferedReader] = {}
        self._entries: dict[str, _Entry] = {}
        # The last tensor of which a part was read, for its other parts.
        self._last: tuple[_Entry, np.ndarray] | None = None
        try:
            for path in _weight_files(directory):
                self._add(path)
            self._split_fused()
            found = {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}
            self._quantised = find_quantised(self.config.get(SECTION), found, str(directory))
            parts = {f"{name}_{part}" for name in self._quantised for part in PARTS} & set(found)
            found = {name: entry for name, entry in found.items() if name not in parts}
            self._scales, helpers = find_scales(self.config, found, str(directory))
            if has_bare_float8(found, self._scales):
                _LOG.warning("%s: has float8 weights without scales; they are read unscaled", directory)
        except BaseException:
            self.close()
            raise
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in self._entries.items() if name not in helpers | parts
        } | {name: matrix.shape for name, matrix in self._quantised.items()}
        self.sizes: Mapping[str, int] = {
            name: entry.n_bytes for name, entry in self._entries.items() if name not in parts
        } | {name: matrix.nbytes for name, matrix in self._quantised.items()}
        self.nbytes = sum(self.sizes.values())
        self.files = tuple(sorted(self._open))
        self.license = _license(directory / "README.md")

    def _add(self, path: Path) -> None:
        try:
            file = self._files.enter_context(path.open("rb"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be opened ({error.strerror}); check the file") from None
        self._open[path] = file
        for name, entry in _read_header(file, path).items():
            if name in self._entries:
                raise UsageError(
                    f"{path}: tensor {name!r} is also in {self._entries[name].path.name}; "
                    "remove the file that is not part of the model"
                )
            self._entries[name] = entry

    def _split_fused(self) -> None:
        """Presents the matrices of fused tensors, which are some rows of them, as tensors of their own."""
        shapes = {name: entry.shape for name, entry in self._entries.items()}
        for name, parts in fused_rows(shapes, self.config, str(self._directory)).items():
            whole = self._entries.pop(name)
            # Of experts there is one matrix below the other, in a tensor with a dimension for them.
            tail = whole.shape[2:] if len(whole.shape) == 3 else whole.shape[1:]
            row = whole.n_bytes // math.prod(whole.shape[: len(whole.shape) - len(tail)])
            for part, rows in parts.items():
                if not rows.at_once:
                    shape = (rows.count, *(whole.shape[:-1] if rows.transposed else tail))
                    n_bytes = math.prod(shape) * (whole.n_bytes // math.prod(whole.shape))
                    self._entries[part] = dataclasses.replace(whole, shape=shape, n_bytes=n_bytes, inside=(whole, rows))
                    continue
                shape = (rows.count, *tail)
                self._entries[part] = dataclasses.replace(
                    whole, shape=shape, start=whole.start + rows.first * row, n_bytes=rows.count * row
                )

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype; a quantised one in float32.

        Raises:
            UsageError: no tensor has that name, its dtype is not supported, or the file has shrunk.
        """
        matrix = self.read_quantised(name)
        if matrix is not None:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                return np.asarray(matrix.dequantise())
        scales = self._scales.get(name)
        if scales is None:
            return self._read(name)
        zero = None if scales.zero is None else self._read(scales.zero)
        return dequantise(self._read(name), self._read(scales.scale), zero, scales.block, name)

    def read_quantised(self, name: str) -> QuantisedMatrix | None:
        """The codes and scales of a quantised matrix as they are stored, in host memory; None for any other tensor."""
        matrix = self._quantised.get(name)
        if matrix is None:
            return None
        found: dict[str, Any] = {
            part: self._read(f"{name}_{part}") for part in PARTS if getattr(matrix, part) is not None
        }
        return whole_groups(dataclasses.replace(matrix, **found))

    def _read(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise UsageError(f"{self._directory}: has no tensor {name!r}; expected one of the names in shapes")
        entry = self._entries[name]
        if entry.inside is None:
            return self._read_piece(name, entry)
        whole, rows = entry.inside
        if self._last is None or self._last[0] != whole:
            self._last = None  # one is freed before the next is read
            self._last = (whole, self._read_piece(name, whole))
        return rows.take(self._last[1])

    def _read_piece(self, name: str, entry: _Entry) -> np.ndarray:
        if entry.dtype not in _DTYPES:
            raise UsageError(
                f"{entry.path}: tensor {name!r} has dtype {entry.dtype!r}, expected one of {', '.join(_DTYPES)}; "
                "convert it with transformers first"
            )
        tensor = np.empty(entry.shape, _DTYPES[entry.dtype])
        file = self._open[entry.path]
        file.seek(entry.start)
        if file.readinto(tensor.reshape(-1).view(np.uint8).data) != entry.n_bytes:
            raise UsageError(f"{entry.path}: ends inside tensor {name!r}; download or copy the file again")
        return tensor

    def tokenizer(self) -> Tokenizer:
        """Loads the directory's tokenizer.

        Raises:
            UsageError: there are no tokenizer files, or they cannot be read.
        """
        if is_encoder(split_config(self.config, self.name)[0]):
            raise UsageError(f"{self.name} is an image encoder, which reads no text; give a language model, or images")
        return Tokenizer.load(self._directory)

    def close(self) -> None:
        """Closes the weight files."""
        self._files.close()


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); a model directory needs {path.name}") from None
    except ValueError as error:
        raise UsageError(f"{path}: is not valid JSON ({error}); download or copy the file again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: does not hold a JSON object; download or copy the file again")
    return value


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    inside = sorted(file.name for file in directory.glob("*.gguf"))
    if inside and not path.exists():
        raise UsageError(f"{directory}: has no config.json; to use a GGUF file in it, give {directory / inside[0]}")
    return read_json_object(path)


def _license(card: Path) -> str | None:
    """The licence that a model card names in its front matter."""
    try:
        text = card.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", head[1], re.MULTILINE) if head else None
    return None if found is None else found[1]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if (directory / _SINGLE).is_file() and not (index.is_file() and _names(index, _SINGLE)):
        # As in transformers. An index beside it usually belongs to an earlier model.
        if index.is_file():
            _LOG.warning("%s: reading %s; %s and its files are ignored", directory, _SINGLE, _INDEX)
        return [directory / _SINGLE]
    if index.is_file():
        return _indexed_files(index)
    every = sorted(directory.glob("*.safetensors"))
    found = [path for path in every if not path.name.startswith("adapter_")]
    if len(every) > len(found) == 0:
        raise UsageError(
            f"{directory}: has only an adapter ({every[0].name}), no model; merge it into its base model, with "
            "merge_and_unload of peft"
        )
    if len(found) == 1:
        return found
    if found:
        raise UsageError(
            f"{directory}: has {len(found)} safetensors files but no {_INDEX}; download or copy the index as well"
        )
    if any(path for pattern in _PICKLES for path in directory.glob(pattern)):
        raise UsageError(
            f"{directory}: has its weights only as pickle files, which can run code and are not read; "
            "convert to safetensors first"
        )
    raise UsageError(f"{directory}: has no weights, expected {_SINGLE} or {_INDEX}; check the path")


def _names(index: Path, file: str) -> bool:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except UsageError:
        return False
    return isinstance(weight_map, dict) and file in map(str, weight_map.values())


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_plain_name, weight_map.values())):
        raise UsageError(f"{index}: has no weight_map of tensor to file names; download or copy the file again")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"{index}: names {len(missing)} file(s) that are not there ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download or copy them as well"
        )
    return paths


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read_header(file: BufferedReader, path: Path) -> dict[str, _Entry]:
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - len(prefix), _MAX_HEADER):
        raise UsageError(
            f"{path}: is truncated or not a safetensors file: its header should have {length} bytes, "
            f"the file has {size}; download or copy it again"
        )
    try:
        header = parse_json(file.read(length))
        data_start = 8 + length
        entries = {name: _entry(path, fields, data_start) for name, fields in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{path}: its safetensors header is corrupt; download or copy it again") from None
    for name, entry in entries.items():
        end = entry.start + entry.n_bytes
        if end > size:
            raise UsageError(
                f"{path}: is truncated: tensor {name!r} ends at byte {end}, the file at byte {size}; "
                "download or copy it again"
            )
    return entries


def _entry(path: Path, fields: Mapping[str, Any], data_start: int) -> _Entry:
    """Checks one header entry; anything malformed raises ValueError, TypeError or KeyError."""
    dtype, shape = str(fields["dtype"]), tuple(fields["shape"])
    start, end = fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end - start)):
        raise ValueError
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
        raise ValueError
    return _Entry(path, dtype, shape, data_start + start, end - start)
