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
import functools
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.types import Bits

BITS = get_args(Bits)
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

    Its arrays have outputs in their last axis: a product then adds whole rows of codes, and reads them in order.

    Attributes:
        codes: (G S, J) int8 with 8 bits; with fewer (bytes, J) uint8, packed by `pack`. 0 after the last number.
        scales: (G, J), of a floating type.
        offsets: As the scales; None if symmetric.
        bits: Of a code, one of `BITS`.
        group_size: S.
        shape: Of the matrix itself.
        axis: The axis that products sum over: 1 if the shape is (J, I), 0 if it is (I, J).

    Example:
        >>> import numpy as np
        >>> codes = np.zeros((32, 1), int)
        >>> codes[:16, 0] = np.arange(-8, 8)
        >>> small = QuantisedMatrix(pack(codes, 4), np.full((1, 1), 0.5), None, 4, 32, (1, 16))
        >>> small.codes.shape, small.dequantise().shape, float(small.dequantise()[0, 0])
        ((16, 1), (1, 16), -4.0)
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
        """Stored bytes: codes, without those after the last number, scales and offsets."""
        others = sum(part.size * part.dtype.itemsize for part in (self.scales, self.offsets) if part is not None)
        return packed_length(self.shape[self.axis], self.bits) * self.shape[1 - self.axis] + others

    def dequantise(self, dtype: Any = jnp.float32) -> Array:
        """The matrix in floating point, of its own shape; computed in float32."""
        return _dequantised(self, dtype)

    def _as_inputs_by_outputs(self, dtype: Any) -> Float[Array, "i j"]:
        groups, rows = self.scales.shape
        codes = jnp.stack(unpack(self.codes, self.bits), axis=1).reshape(groups, self.group_size, rows)
        whole = codes.astype(jnp.float32) * jnp.asarray(self.scales, jnp.float32)[:, None]
        if self.offsets is not None:
            whole = whole + jnp.asarray(self.offsets, jnp.float32)[:, None]
        return whole.reshape(-1, rows)[: self.shape[self.axis]].astype(dtype)

    def take(self, rows: Int[Array, "*batch"], dtype: Any = jnp.float32) -> Float[Array, "*batch i"]:
        """Some rows of an embedding (J, I), dequantised; only they are read."""
        parts = jax.tree.map(lambda part: jnp.take(part, rows.reshape(-1), axis=1), self)
        some = dataclasses.replace(parts, shape=(rows.size, self.shape[1]))
        return some.dequantise(dtype).reshape(*rows.shape, self.shape[1])


# One program for a shape, instead of one for every step of the arithmetic.
@partial(jax.jit, static_argnums=1, inline=True)
def _dequantised(quantised: QuantisedMatrix, dtype: Any) -> Array:
    matrix = quantised._as_inputs_by_outputs(dtype)
    return matrix.T if quantised.axis else matrix


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
    kind = np.promote_types(x.dtype, np.float32)
    if not isinstance(matrix, QuantisedMatrix):
        spec = "...i,ji->...j" if axis else "...i,ij->...j"
        return jnp.einsum(spec, x, matrix.astype(x.dtype), preferred_element_type=kind)
    assert matrix.axis == axis, "groups run along the axis that is summed over"
    few = math.prod(x.shape[:-1]) <= _FEW_TOKENS
    width = matrix.scales.shape[0] * matrix.group_size if few else matrix.shape[axis]
    if x.shape[-1] < width:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    if not few:
        return contract(x, matrix._as_inputs_by_outputs(x.dtype), axis=0)
    y_TxJ = _contract_codes(x.reshape(-1, width).astype(kind), matrix)
    return y_TxJ.reshape(*x.shape[:-1], y_TxJ.shape[-1])


def _contract_codes(x_TxI: Float[Array, "t i"], matrix: QuantisedMatrix) -> Float[Array, "t j"]:
    """The product for a few tokens, group by group: codes are unpacked, multiplied and summed in one loop."""
    (groups, rows), size, kind = matrix.scales.shape, matrix.group_size, x_TxI.dtype
    x_GxTxS = x_TxI.reshape(-1, groups, size).swapaxes(0, 1)

    def add_group(y_TxJ: Array, group: tuple[Any, ...]) -> tuple[Array, None]:
        codes, scale_J, offset_J, x_TxS = group
        parts = unpack(codes, matrix.bits)
        sums = []
        for x_S in x_TxS:
            terms = [part.astype(kind) * x_S[k :: len(parts), None] for k, part in enumerate(parts)]
            sums.append(functools.reduce(operator.add, terms).sum(axis=0))
        y_TxJ = y_TxJ + jnp.stack(sums) * scale_J.astype(kind)
        if offset_J is not None:
            y_TxJ = y_TxJ + x_TxS.sum(axis=1)[:, None] * offset_J.astype(kind)
        return y_TxJ, None

    codes = matrix.codes.reshape(groups, -1, rows)
    start = jnp.zeros((x_TxI.shape[0], rows), kind)
    y_TxJ: Array = jax.lax.scan(add_group, start, (codes, matrix.scales, matrix.offsets, x_GxTxS))[0]
    return y_TxJ


def pack(codes: Int[np.ndarray, "i j"], bits: int) -> Int[np.ndarray, "b j"]:
    """Codes as bytes: K successive codes of a column, the first in the lowest bits, fill B bytes, the lowest first.

    Args:
        codes: From -2^(bits-1) to 2^(bits-1) - 1; stored as their lowest bits.
        bits: One of `BITS`.

    Returns:
        (bytes, J) uint8, padded with codes of 0 to whole units of K; with 8 bits the codes themselves as int8.

    Example:
        >>> import numpy as np
        >>> pack(np.array([[1], [2], [-1]]), 4).tolist()
        [[33], [15]]
    """
    if bits == 8:
        return codes.astype(np.int8)
    count, n_bytes = _PACKED[bits]
    low = np.pad(codes, ((0, -len(codes) % count), (0, 0))).astype(np.uint32) & (2**bits - 1)
    words = np.zeros((len(low) // count, low.shape[1]), np.uint32)
    for k in range(count):
        words |= low[k::count] << np.uint32(bits * k)
    parts = [(words >> np.uint32(8 * place)).astype(np.uint8) for place in range(n_bytes)]
    return np.stack(parts, axis=1).reshape(-1, codes.shape[1])


def packed_length(length: int, bits: int) -> int:
    """Bytes of a column of packed codes."""
    count, n_bytes = _PACKED[bits]
    return -(-length // count) * n_bytes


def unpack(packed: Int[Array, "b j"], bits: int) -> list[Int[Array, "n j"]]:
    """The inverse of `pack` as K arrays: the k-th has every K-th code of a column, from the k-th."""
    if bits == 8:
        return [packed]
    count, n_bytes = _PACKED[bits]
    words = packed.astype(jnp.int32)
    if n_bytes > 1:
        places = words.reshape(-1, n_bytes, packed.shape[1])
        words = functools.reduce(operator.or_, (places[:, place] << (8 * place) for place in range(n_bytes)))
    half = 2 ** (bits - 1)
    return [(((words >> (bits * k)) & (2**bits - 1)) ^ half) - half for k in range(count)]


def is_quantised(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is quantised; for `jax.tree`'s `is_leaf`."""
    return isinstance(leaf, QuantisedMatrix)


def stored_parameter(module: nn.Module, name: str, init: Callable[..., Any], *arguments: Any) -> Any:
    """A linen module's parameter, or the quantised matrices that are stored in its place; otherwise `module.param`.

    Linen compares the shapes of a parameter's arrays with those that its initialiser makes, and codes have others.
    """
    if module.has_variable("params", name):
        value: Any = module.get_variable("params", name)
        if any(map(is_quantised, jax.tree.leaves(value, is_leaf=is_quantised))):
            return value
    return module.param(name, init, *arguments)
