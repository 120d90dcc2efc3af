"""Fused tensors: several of our matrices, one below the other, in one tensor of a family's own files.

In some families the rows of the parts take turns, head by head, and in some the tensors are stored transposed.
Everywhere else each matrix has its own name, also in files of compact models. A plain model is written with the
family's own tensors, so that transformers loads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.families import FAMILIES, Family, family_of
from ngc_jax.models.saved_config import split_config


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a fused tensor that are one matrix: some at once, or runs that take turns with those of other parts.

    Attributes:
        first: The first row.
        count: Rows of the matrix.
        run: Rows in a row; `count` if None.
        stride: From a run to the next, if there are several.
        transposed: Whether the tensor is stored transposed, so that these are columns of the stored one.

    Example:
        >>> Rows(1, 4, run=2, stride=6).take(np.arange(12))
        array([1, 2, 7, 8])
    """

    first: int
    count: int
    run: int | None = None
    stride: int = 0
    transposed: bool = False

    @property
    def at_once(self) -> bool:
        """Whether they are one piece of the stored tensor."""
        return self.run is None and not self.transposed

    def take(self, stored: np.ndarray) -> np.ndarray:
        """The matrix, or its bias, from the stored tensor."""
        tensor = stored.T if self.transposed else stored
        if self.run is None:
            return np.ascontiguousarray(tensor[self.first : self.first + self.count])
        runs = tensor.reshape(-1, self.stride, *tensor.shape[1:])[:, self.first : self.first + self.run]
        return runs.reshape(self.count, *tensor.shape[1:])


def fused_rows(
    shapes: Mapping[str, tuple[int, ...]], hf_config: Mapping[str, Any], source: str
) -> dict[str, dict[str, Rows]]:
    """Where the matrices are in the fused tensors of a file.

    Args:
        shapes: Of all tensors, by name.
        hf_config: The whole config.json.
        source: The model, for messages.

    Returns:
        By the name of a fused tensor, the names of its parts with their rows; empty if the file has none.

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
    found: dict[str, dict[str, Rows]] = {}
    for name, module in candidates.items():
        if module not in family.fused or not name.endswith((".weight", ".bias")):
            continue
        transposed = family.transposed and len(shapes[name]) == 2
        parts: dict[str, Rows] = {}
        first = 0
        for part in family.fused[module]:
            parts[name.replace(module, part)] = Rows(first, sizes[part], transposed=transposed)
            first += sizes[part]
        if shapes[name][::-1][:1] != (first,) if transposed else shapes[name][:1] != (first,):
            raise UsageError(
                f"tensor {name!r} of {source} is {tuple(shapes[name])}, expected {first} "
                f"{'columns' if transposed else 'rows'} by its config.json; download the whole model again"
            )
        if family.by_head and len(parts) > 1:
            run = config.head_dim
            parts = {
                part: Rows(number * run, rows.count, run, len(parts) * run, transposed)
                for number, (part, rows) in enumerate(parts.items())
            }
        found[name] = parts
    return found


def _stacked_rows(
    shapes: Mapping[str, tuple[int, ...]], hf_config: Mapping[str, Any], source: str
) -> dict[str, dict[str, Rows]]:
    """As `fused_rows`, of tensors (E, rows, columns) with matrices of every expert; rows are counted over all."""
    modules = {module for family in FAMILIES.values() for module in family.stacked}
    if not any(name.endswith(module) for name in shapes for module in modules):
        return {}
    dense, _ = split_config(hf_config, source)
    family = FAMILIES.get(str(dense.get("model_type")))
    if family is None or not family.stacked:
        return {}
    experts = DecoderConfig.from_hf(dense).experts
    found: dict[str, dict[str, Rows]] = {}
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
            f"{name.removesuffix(module)}{part.replace('*', str(expert))}.weight": Rows(number * rows, rows)
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


def own_tensor(parts: Sequence[Any], name: str, config: DecoderConfig) -> Any:
    """A tensor of the family's own files, from the matrices that it consists of (arrays of NumPy or of JAX).

    Args:
        parts: The matrices, or their biases, in the order of `fused_names`.
        name: Of the tensor.
        config: The decoder.
    """
    family = family_of(config.architecture)
    if config.experts is not None and any(name.endswith(f".{module}") for module in family.stacked):
        whole = _below(parts)
        return whole.reshape(config.experts.count, -1, whole.shape[-1])
    module = next((module for module in family.fused if f".{module}." in name), None)
    if module is None:
        return _below(parts)
    if family.by_head and len(parts) > 1:
        heads = [part.reshape(-1, 1, config.head_dim, *part.shape[1:]) for part in parts]
        kind = np if isinstance(parts[0], np.ndarray) else jnp
        whole = kind.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
    else:
        whole = _below(parts)
    if not family.transposed or whole.ndim != 2:
        return whole
    # Files are written from arrays' memory.
    return np.ascontiguousarray(whole.T) if isinstance(whole, np.ndarray) else whole.T


def _below(parts: Sequence[Any]) -> Any:
    """Arrays one below the other."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else jnp.concatenate(list(parts))


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

    def __init__(self, tensors: Any, config: DecoderConfig) -> None:
        """Wrap named tensors of a decoder, each matrix by itself."""
        family = family_of(config.architecture)
        self._tensors, self._parts, self._config = tensors, fused_names(tensors.shapes, family), config
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (sum(tensors.shapes[part][0] for part in parts), *tensors.shapes[parts[0]][1:])
            for name, parts in self._parts.items()
        }
        turned = [module for module in family.fused if family.transposed]
        self.shapes = {
            name: shape[::-1] if any(f".{module}." in name for module in turned) else shape
            for name, shape in self.shapes.items()
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
        return own_tensor(parts, name, self._config)


def _apart(shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    return experts, shape[0] // experts, *shape[1:]
