"""Fused tensors: several of our matrices, one below the other, in one tensor of a family's own files.

Everywhere else each matrix has its own name, also in files of compact models. A plain model is written with the
family's own tensors, so that transformers loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.families import FAMILIES, Family
from ngc_jax.models.saved_config import split_config


def fused_rows(
    shapes: Mapping[str, tuple[int, ...]], hf_config: Mapping[str, Any], source: str
) -> dict[str, dict[str, tuple[int, int]]]:
    """Where the matrices are in the fused tensors of a file.

    Args:
        shapes: Of all tensors, by name.
        hf_config: The whole config.json.
        source: The model, for messages.

    Returns:
        By the name of a fused tensor, the names of its parts with their first row and their number of rows; empty if
        the file has none.

    Raises:
        UsageError: If a fused tensor has another number of rows than its parts together.
    """
    modules = {module for family in FAMILIES.values() for module in family.fused}
    stacked = _stacked_rows(shapes, hf_config, source)
    if stacked:
        return stacked
    candidates = {name: module for name in shapes for module in modules if f".{module}." in name}
    if not candidates:
        return {}
    dense, _ = split_config(hf_config, source)
    family = FAMILIES.get(str(dense.get("model_type")))
    if family is None or not family.fused:
        return {}
    config = DecoderConfig.from_hf(dense)
    blocks = {block_name(0, role).removeprefix("layers.0."): config.block(0, role) for role in config.roles}
    sizes = {family.modules[module]: block.d_out for module, block in blocks.items()}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in candidates.items():
        if module not in family.fused or not name.endswith((".weight", ".bias")):
            continue
        parts: dict[str, tuple[int, int]] = {}
        first = 0
        for part in family.fused[module]:
            parts[name.replace(module, part)] = (first, sizes[part])
            first += sizes[part]
        if shapes[name][:1] != (first,):
            raise UsageError(
                f"tensor {name!r} of {source} is {tuple(shapes[name])}, expected {first} rows by its config.json; "
                "download the whole model again"
            )
        found[name] = parts
    return found


def _stacked_rows(
    shapes: Mapping[str, tuple[int, ...]], hf_config: Mapping[str, Any], source: str
) -> dict[str, dict[str, tuple[int, int]]]:
    """As `fused_rows`, of tensors (E, rows, columns) with matrices of every expert; rows are counted over all."""
    modules = {module for family in FAMILIES.values() for module in family.stacked}
    if not any(name.endswith(module) for name in shapes for module in modules):
        return {}
    dense, _ = split_config(hf_config, source)
    family = FAMILIES.get(str(dense.get("model_type")))
    if family is None or not family.stacked:
        return {}
    experts = DecoderConfig.from_hf(dense).experts
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        module = next((module for module in family.stacked if name.endswith(f".{module}")), None)
        if module is None or experts is None:
            continue
        inner = family.stacked[module]
        if len(shape) != 3 or shape[0] != experts.count or shape[1] % len(inner):
            raise UsageError(
                f"tensor {name!r} of {source} is {tuple(shape)}, expected the matrices of {experts.count} experts by "
                "its config.json; download the whole model again"
            )
        rows = shape[1] // len(inner)
        places = [(expert, part) for expert in range(experts.count) for part in inner]
        found[name] = {
            f"{name.removesuffix(module)}{part.replace('*', str(expert))}.weight": (number * rows, rows)
            for number, (expert, part) in enumerate(places)
        }
    return found


def _stacked_names(names: list[str], family: Family) -> dict[str, tuple[str, ...]]:
    """As `fused_names`, for a family whose own files have the matrices of all experts in one tensor."""
    found: dict[str, tuple[str, ...]] = {}
    for whole, parts in family.stacked.items():
        marked = [part.partition("*")[::2] for part in parts]
        for name in names:
            head, _, rest = name.partition(f".{marked[0][0]}")
            if not rest.endswith(f"{marked[0][1]}.weight") or not rest.partition(".")[0].isdecimal():
                continue
            numbers = range(sum(other.startswith(f"{head}.{marked[0][0]}") for other in names) // _per_expert(family))
            found.setdefault(
                f"{head}.{whole}",
                tuple(f"{head}.{part.replace('*', str(number))}.weight" for number in numbers for part in parts),
            )
    taken = {part for parts in found.values() for part in parts}
    return {**{name: (name,) for name in names if name not in taken}, **found}


def _per_expert(family: Family) -> int:
    return sum(module.endswith(".*") for module in family.modules)


def with_experts(tensor: Any, name: str, family: Family, config: DecoderConfig) -> Any:
    """A tensor of the family's own files, from the matrices that it consists of, one below the other."""
    if config.experts is None or not any(name.endswith(f".{module}") for module in family.stacked):
        return tensor
    return tensor.reshape(config.experts.count, -1, tensor.shape[-1])


def fused_names(names: Iterable[str], family: Family) -> dict[str, tuple[str, ...]]:
    """The tensors of the family's own files, and of which named tensors each consists, in the order of the names.

    Args:
        names: Of tensors of the plain model, each matrix by itself.
        family: Of the model.
    """
    if family.writes_stacked:
        return _stacked_names(list(names), family)
    own = {part: fused for fused, parts in family.fused.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        module = next((part for part in own if f".{part}." in name), None)
        if module is None:
            found[name] = (name,)
        else:
            whole = name.replace(module, own[module])
            found[whole] = tuple(name.replace(module, part) for part in family.fused[own[module]])
    return found


class FusedTensors:
    """The tensors of a plain model as the family's own files have them; see `exporting.huggingface.Tensors`."""

    def __init__(self, tensors: Any, family: Family) -> None:
        """Wrap named tensors, each matrix by itself."""
        self._tensors, self._parts = tensors, fused_names(tensors.shapes, family)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (sum(tensors.shapes[part][0] for part in parts), *tensors.shapes[parts[0]][1:])
            for name, parts in self._parts.items()
        }
        # Of experts: one dimension for their number, which the file's own names do not say.
        inner = {
            name: len(parts)
            for module, parts in family.stacked.items()
            for name in self.shapes
            if name.endswith(f".{module}")
        }
        self.shapes = {
            name: shape if name not in inner else _apart(shape, len(self._parts[name]) // inner[name])
            for name, shape in self.shapes.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        parts = [self._tensors.read(part) for part in self._parts[name]]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.astype(np.float32) for part in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts).reshape(self.shapes[name])


def _apart(shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    return experts, shape[0] // experts, *shape[1:]
