"""Matrices stored in a few bits: integer codes, packed, with a scale for every group of a row's numbers.

    w = scale * code            symmetric
    w = scale * code + offset   affine

A group is `group_size` successive numbers along the axis that a product sums over; the last one of a row may be
smaller, since ranks are whatever the budget gave. A `QuantisedMatrix` takes a matrix's place in the parameter tree.
Products read the codes: no copy of the matrix in floating point is kept.

Legend: J rows (one for each output of a product), I numbers of a row (summed over), G groups of a row, S group size, K
codes that are packed together, B bytes that they take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
# K and B, by bits.
_PACKED = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
# Number of tokens up to which a product reads the codes directly. A matrix that more tokens share is dequantised first.
_FEW_TOKENS = 4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "offsets"),
    meta_fields=("bits", "group_size", "shape", "axis"),
)
@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix of integer codes; a pytree of its arrays.

    Attributes:
        codes: (J, I) int8 with 8 bits; with fewer (J, bytes) uint8, packed by `pack`.
        scales: (J, G), of a floating type.
        offsets: As the scales; None if symmetric.
        bits: Of a code, one of `BITS`.
        group_size: S.
        shape: Of the matrix itself.
        axis: The axis that products sum over: 1 if the shape is (J, I), 0 if it is (I, J).

    Example:
        >>> import numpy as np
        >>> codes = np.arange(-8, 8).reshape(1, 16)
        >>> small = QuantisedMatrix(pack(codes, 4), np.full((1, 1), 0.5), None, 4, 32, (1, 16))
        >>> small.codes.shape, float(small.dequantise()[0, 0])
        ((1, 8), -4.0)
    """

    codes: Any
    scales: Any
    offsets: Any
    bits: int
    group_size: int
    shape: tuple[int, int]
    axis: int = 1

    @property
    def size(self) -> int:
        """Numbers of the matrix."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and offsets."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(self))

    def dequantise(self, dtype: Any = jnp.float32) -> Array:
        """The matrix in floating point, of its own shape; computed in float32."""
        rows, groups = self.scales.shape
        codes_JxI = jnp.stack(unpack(self.codes, self.bits), axis=-1).reshape(rows, -1)
        whole = jnp.asarray(_in_groups(codes_JxI, self.shape[self.axis], groups, self.group_size), jnp.float32)
        whole = whole * jnp.asarray(self.scales, jnp.float32)[..., None]
        if self.offsets is not None:
            whole = whole + jnp.asarray(self.offsets, jnp.float32)[..., None]
        matrix = whole.reshape(rows, -1)[:, : self.shape[self.axis]].astype(dtype)
        return matrix if self.axis else matrix.T

    def take(self, rows: Int[Array, "*batch"], dtype: Any = jnp.float32) -> Float[Array, "*batch i"]:
        """Some rows of an embedding (J, I), dequantised; only they are read."""
        parts = jax.tree.map(lambda part: jnp.take(part, rows.reshape(-1), axis=0), self)
        some = dataclasses.replace(parts, shape=(rows.size, self.shape[1]))
        return some.dequantise(dtype).reshape(*rows.shape, self.shape[1])


def contract(x: Float[Array, "*batch i"], matrix: Any, axis: int = 1) -> Float[Array, "*batch j"]:
    """The product of x with a matrix, summed over one axis of the matrix.

    Args:
        x: (..., I).
        matrix: (J, I), or (I, J) with axis 0: an array, or a `QuantisedMatrix`, of which a narrower x meets the first
            numbers of every row.
        axis: The matrix's axis to sum over.

    Returns:
        (..., J), in the type in which products accumulate: float32 at least.
    """
    kind = jnp.promote_types(x.dtype, jnp.float32)
    if not isinstance(matrix, QuantisedMatrix):
        spec = "...i,ji->...j" if axis else "...i,ij->...j"
        return jnp.einsum(spec, x, matrix.astype(x.dtype), preferred_element_type=kind)
    assert matrix.axis == axis, "groups run along the axis that is summed over"
    width = matrix.shape[axis]
    if x.shape[-1] < width:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    if math.prod(x.shape[:-1]) > _FEW_TOKENS:
        return contract(x, matrix.dequantise(x.dtype), axis)
    tokens = [_contract_codes(token, matrix) for token in x.reshape(-1, width).astype(kind)]
    return jnp.stack(tokens).reshape(*x.shape[:-1], matrix.scales.shape[0])


def _contract_codes(x_I: Float[Array, " i"], matrix: QuantisedMatrix) -> Float[Array, " j"]:
    """The product for one token: codes are unpacked, multiplied and summed in one loop, and scaled group by group."""
    (rows, groups), size = matrix.scales.shape, matrix.group_size
    x_GxS = jnp.pad(x_I, (0, groups * size - len(x_I))).reshape(groups, size)
    parts = unpack(matrix.codes, matrix.bits)
    products = jnp.zeros((), x_I.dtype)
    for k, part in enumerate(parts):
        n = size // len(parts)
        codes = _in_groups(part, part.shape[1], groups, n).astype(x_I.dtype)
        products = products + codes * x_GxS[:, k :: len(parts)]
    y_J = (products.sum(axis=-1) * matrix.scales.astype(x_I.dtype)).sum(axis=-1)
    return y_J if matrix.offsets is None else y_J + matrix.offsets.astype(x_I.dtype) @ x_GxS.sum(axis=-1)


def _in_groups(codes: Array, width: int, groups: int, size: int) -> Array:
    """(J, at least `width`) codes as (J, groups, size); zeros after the last."""
    codes = codes[:, :width]
    if groups * size > width:
        codes = jnp.pad(codes, ((0, 0), (0, groups * size - width)))
    return codes.reshape(len(codes), groups, size)


def pack(codes: Int[np.ndarray, "j i"], bits: int) -> Int[np.ndarray, "j b"]:
    """Codes as bytes: K successive codes, the first in the lowest bits, fill B bytes, the lowest first.

    Args:
        codes: From -2^(bits-1) to 2^(bits-1) - 1; stored as their lowest bits.
        bits: One of `BITS`.

    Returns:
        (J, bytes) uint8, rows padded with zeros to a whole byte; with 8 bits the codes themselves as int8.

    Example:
        >>> import numpy as np
        >>> pack(np.array([[1, 2, -1]]), 4).tolist()
        [[33, 15]]
    """
    if bits == 8:
        return codes.astype(np.int8)
    count, n_bytes = _PACKED[bits]
    pad = -codes.shape[1] % count
    low = np.pad(codes, ((0, 0), (0, pad))).astype(np.uint32) & (2**bits - 1)
    words = (low.reshape(len(codes), -1, count) << (bits * np.arange(count, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    packed = (words[..., None] >> (8 * np.arange(n_bytes, dtype=np.uint32))).astype(np.uint8)
    return np.ascontiguousarray(packed.reshape(len(codes), -1)[:, : packed_width(codes.shape[1], bits)])


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of packed codes: whole units of K codes."""
    count, n_bytes = _PACKED[bits]
    return -(-width // count) * n_bytes


def unpack(packed: Int[Array, "j b"], bits: int) -> list[Int[Array, "j n"]]:
    """The inverse of `pack` as K arrays of int8: the k-th has every K-th code of a row, from the k-th."""
    if bits == 8:
        return [packed]
    count, n_bytes = _PACKED[bits]
    words = packed
    if n_bytes > 1:
        places = packed.reshape(len(packed), -1, n_bytes).astype(jnp.uint32)
        words = sum(places[..., place] << (8 * place) for place in range(n_bytes))
    half = 2 ** (bits - 1)
    lows = [((words >> (bits * k)) & (2**bits - 1)).astype(jnp.int8) for k in range(count)]
    return [(low ^ half) - jnp.int8(half) for low in lows]


def is_quantised(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is quantised; for `jax.tree`'s `is_leaf`."""
    return isinstance(leaf, QuantisedMatrix)


def stored_parameter(module: nn.Module, name: str, init: Callable[..., Any], *arguments: Any) -> Any:
    """A linen module's parameter, or the quantised matrices that are stored in its place; otherwise `module.param`.

    Linen compares the shapes of a parameter's arrays with those that its initialiser makes, and codes have others.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if any(map(is_quantised, jax.tree.leaves(value, is_leaf=is_quantised))):
            return value
    return module.param(name, init, *arguments)
