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


def gguf_blocks(matrix: QuantisedMatrix) -> tuple[GGMLQuantizationType, UInt8[np.ndarray, "J B"]] | None:
    """A matrix in GGUF's blocks.

    Args:
        matrix: (J, I), with groups along I.

    Returns:
        The type, and the bytes of every row. Symmetric matrices are exact; the offset m of an affine one is rounded to
        float16. None where GGUF has no such blocks: groups or rows that are no whole number of blocks, 8 bits with
        offsets, scales beyond float16.

    Example:
        >>> from ngc_jax.conversion.rounding import Grid, round_to_nearest
        >>> kind, rows = gguf_blocks(round_to_nearest(np.ones((3, 64)), Grid(4, 64, symmetric=True)))
        >>> kind.name, rows.shape  # two blocks of 18 bytes a row
        ('Q4_0', (3, 36))
    """
    width = matrix.shape[1]
    if (
        matrix.axis != 1
        or width % _BLOCK
        or matrix.group_size % _BLOCK
        or (matrix.bits == 8 and matrix.offsets is not None)
    ):
        return None
    per_group = matrix.group_size // _BLOCK
    scales_KxJ = np.repeat(np.asarray(matrix.scales, np.float32), per_group, axis=0)[: width // _BLOCK]
    codes_JxKxS = _codes(matrix).T.reshape(matrix.shape[0], -1, _BLOCK)
    if matrix.offsets is None:
        head = [scales_KxJ]
        kind = GGMLQuantizationType.Q8_0 if matrix.bits == 8 else GGMLQuantizationType.Q4_0
    else:
        offsets_KxJ = np.repeat(np.asarray(matrix.offsets, np.float32), per_group, axis=0)[: width // _BLOCK]
        head = [scales_KxJ, offsets_KxJ - 8 * scales_KxJ]
        kind = GGMLQuantizationType.Q4_1
    with np.errstate(over="ignore"):
        halves = [part.T.astype(np.float16) for part in head]
    if not all(np.isfinite(part).all() for part in halves) or not np.array_equal(halves[0], scales_KxJ.T):
        return None
    if kind == GGMLQuantizationType.Q8_0:
        numbers: np.ndarray = codes_JxKxS.astype(np.int8).view(np.uint8)
    else:
        shifted = (codes_JxKxS + 8).astype(np.uint8)
        numbers = shifted[..., : _BLOCK // 2] | (shifted[..., _BLOCK // 2 :] << 4)
    parts = [np.ascontiguousarray(part)[..., None].view(np.uint8) for part in halves]
    return kind, np.concatenate([*parts, numbers], axis=2).reshape(matrix.shape[0], -1)


def _codes(matrix: QuantisedMatrix) -> np.ndarray:
    """(I, J), on the host."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        parts = np.stack([np.asarray(part) for part in unpack(jnp.asarray(matrix.codes), matrix.bits)], axis=1)
    return parts.reshape(-1, parts.shape[-1])[: matrix.shape[1]].astype(np.int32)
