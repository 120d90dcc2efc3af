"""Quantised matrices in safetensors files, described in our section of config.json.

The matrix of tensor T is stored as T_codes (int8, or uint8 where codes are packed), T_scales and, unless it is
symmetric, T_offsets (float16 or bfloat16). The section's entry "quantised" has, by T, bits, group size, shape and the
axis that groups run along; see `ngc_jax.groups.quantised`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ngc_jax.errors import UsageError
from ngc_jax.groups.quantised import BITS, QuantisedMatrix, is_quantised, packed_length
from ngc_jax.models.config import DecoderConfig, brief
from ngc_jax.models.keys import hf_name
from ngc_jax.types import Params

ENTRY = "quantised"
PARTS = ("codes", "scales", "offsets")
_DESCRIBED = ("bits", "group_size", "shape", "axis")


def describe_quantised(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """The entry of config.json for a parameter tree; empty if nothing is quantised."""
    leaves = {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    return {
        hf_name(path, config): {
            field: list(value) if isinstance(value := getattr(leaf, field), tuple) else value for field in _DESCRIBED
        }
        for path, leaf in leaves.items()
        if is_quantised(leaf)
    }


def tensors_of(name: str, leaf: Any) -> dict[str, Any]:
    """The tensors that store a parameter, by name."""
    if not is_quantised(leaf):
        return {name: leaf}
    found = {f"{name}_{part}": array for part in PARTS if (array := getattr(leaf, part)) is not None}
    stored = packed_length(leaf.shape[leaf.axis], leaf.bits)
    return found | {f"{name}_codes": leaf.codes if len(leaf.codes) == stored else leaf.codes[:stored]}


def whole_groups(matrix: QuantisedMatrix) -> QuantisedMatrix:
    """A matrix as it is stored with the codes that complete its last group, in host memory."""
    whole = packed_length(matrix.scales.shape[0] * matrix.group_size, matrix.bits)
    return dataclasses.replace(matrix, codes=np.pad(matrix.codes, ((0, whole - len(matrix.codes)), (0, 0))))


def find_quantised(
    section: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> dict[str, QuantisedMatrix]:
    """The quantised matrices of a file, with the shapes and types of their arrays in place of the arrays.

    Args:
        section: Our section of config.json.
        tensors: Type, as safetensors calls it, and shape of every stored tensor.
        where: The model, for messages.

    Returns:
        By the name of the tensor that each takes the place of.

    Raises:
        UsageError: If the description is damaged, or the tensors do not fit it.
    """
    entries = section.get(ENTRY) if isinstance(section, Mapping) else None
    if entries is None:
        return {}
    if not isinstance(entries, Mapping):
        raise UsageError(f"config.json of {where} does not describe its quantised matrices; convert the model again")
    return {str(name): _find(str(name), entry, tensors, where) for name, entry in entries.items()}


def _find(name: str, entry: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str) -> QuantisedMatrix:
    described: Any = entry if isinstance(entry, Mapping) else {}
    bits, size, shape, axis = (described.get(field) for field in _DESCRIBED)
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0]
    numbers = (bits, size, axis, *sizes)
    if (
        any(type(number) is not int for number in numbers)
        or (bits not in BITS or axis not in (0, 1))
        or min(size, *sizes) < 1
        or size % 8
    ):
        raise UsageError(
            f"config.json of {where} describes the quantised matrix {name!r} as {brief(entry)}, which this ngc-jax "
            "does not read; convert the model again"
        )
    rows, width = shape[1 - axis], shape[axis]
    groups = -(-width // size)
    wanted = {"codes": (packed_length(width, bits), rows), "scales": (groups, rows), "offsets": (groups, rows)}
    kinds = {"codes": ("I8",) if bits == 8 else ("U8",), "scales": ("F16", "BF16", "F32")}
    parts: dict[str, Any] = {}
    for part in PARTS:
        stored = tensors.get(f"{name}_{part}")
        if stored is None and part == "offsets":
            parts[part] = None
            continue
        kind, found = stored or ("nothing", ())
        if kind not in kinds.get(part, kinds["scales"]) or tuple(found) != wanted[part]:
            raise UsageError(
                f"{where}: tensor {f'{name}_{part}'!r} is {kind} {tuple(found)}, expected "
                f"{' or '.join(kinds.get(part, kinds['scales']))} {wanted[part]} by its config.json; get the model "
                "again"
            )
        parts[part] = jax.ShapeDtypeStruct(found, _TYPES[kind])
    return QuantisedMatrix(**parts, bits=bits, group_size=size, shape=(shape[0], shape[1]), axis=axis)


_TYPES = {"I8": "int8", "U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
