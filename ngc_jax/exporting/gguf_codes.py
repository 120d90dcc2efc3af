"""Quantised matrices as blocks of GGUF: the same codes and scales, so that nothing is rounded again.

A block has 32 numbers of a row. GGUF's types are

    q4_0  w = d (q - 8)        d float16, q of 4 bits
    q4_1  w = d q + m          d and m float16
    q8_0  w = d q              q int8

A group of ours is one or several whole blocks with the same scale. 2 and 3 bits take the blocks of 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import UInt8

from ngc_jax.groups.quantised import QuantisedMatrix, unpack

_BLOCK = 32


def gguf_type(matrix: QuantisedMatrix) -> GGMLQuantizationType | None:
    """The type whose blocks hold a matrix (J, I) with groups along I, by its codes and scales.

    None where GGUF has no such blocks: groups or rows that are no whole number of blocks, 8 bits with offsets, scales
    beyond float16.

    Example:
        >>> from ngc_jax.conversion.rounding import Grid, round_to_nearest
        >>> gguf_type(round_to_nearest(np.ones((3, 64)), Grid(4, 64, symmetric=True))).name
        'Q4_0'
    """
    if matrix.axis != 1 or matrix.shape[1] % _BLOCK or matrix.group_size % _BLOCK:
        return None
    if matrix.bits == 8 and matrix.offsets is not None:
        return None
    heads = _heads(matrix)
    if not all(np.isfinite(part).all() for part in heads) or not np.array_equal(heads[0], matrix.scales):
        return None
    if matrix.offsets is not None:
        return GGMLQuantizationType.Q4_1
    return GGMLQuantizationType.Q8_0 if matrix.bits == 8 else GGMLQuantizationType.Q4_0


def gguf_blocks(matrix: QuantisedMatrix) -> UInt8[np.ndarray, "J B"]:
    """The bytes of every row of a matrix that has a `gguf_type`.

    Symmetric matrices are exact; the offset m of an affine one is rounded to float16.

    Example:
        >>> from ngc_jax.conversion.rounding import Grid, round_to_nearest
        >>> gguf_blocks(round_to_nearest(np.ones((3, 64)), Grid(4, 64, symmetric=True))).shape  # two blocks of 18
        (3, 36)
    """
    codes_JxKxS = _codes(matrix).T.reshape(matrix.shape[0], -1, _BLOCK)
    if matrix.bits == 8:
        numbers: np.ndarray = codes_JxKxS.astype(np.int8).view(np.uint8)
    else:
        shifted = (codes_JxKxS + 8).astype(np.uint8)
        numbers = shifted[..., : _BLOCK // 2] | (shifted[..., _BLOCK // 2 :] << 4)
    blocks, per_group = matrix.shape[1] // _BLOCK, matrix.group_size // _BLOCK
    heads = [np.repeat(part.T, per_group, axis=1)[:, :blocks, None].view(np.uint8) for part in _heads(matrix)]
    return np.concatenate([*heads, numbers], axis=2).reshape(matrix.shape[0], -1)


def _heads(matrix: QuantisedMatrix) -> list[np.ndarray]:
    """What precedes the codes of a block, in float16 by group (G, J): d, and m if there are offsets."""
    scales = np.asarray(matrix.scales, np.float32)
    found = [scales] if matrix.offsets is None else [scales, np.asarray(matrix.offsets, np.float32) - 8 * scales]
    with np.errstate(over="ignore"):
        return [part.astype(np.float16) for part in found]


def _codes(matrix: QuantisedMatrix) -> np.ndarray:
    """(I, J), on the host."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        parts = np.stack([np.asarray(part) for part in unpack(jnp.asarray(matrix.codes), matrix.bits)], axis=1)
    return parts.reshape(-1, parts.shape[-1])[: matrix.shape[1]].astype(np.int32)
