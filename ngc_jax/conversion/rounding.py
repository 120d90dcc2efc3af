"""Round a matrix to a few bits: grids for groups of numbers, and rounding with error feedback.

The loss of rounding W to Q is tr(G (W - Q) C (W - Q)^T), with C the second moment of the inputs and G that of the
loss's gradients by the outputs. Numbers are rounded one after the other, and the error of each is compensated by those
not yet rounded. Along a row that is GPTQ (arXiv 2210.17323, section 3), the same as LDLQ (QuIP, arXiv 2307.13304,
section 3.1); along a column, too, it is the rounding of YAQA (arXiv 2505.22988), whose Hessian is a Kronecker product.
Inputs of more energy and outputs of larger gradients are rounded first. Grids are fixed before, so that the order is
free of groups.

Legend: J rows, I inputs, G groups of a row, S group size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from ngc_jax.conversion.closed_form import mean_diagonal
from ngc_jax.groups.quantised import QuantisedMatrix, pack

# Relative to the mean diagonal of C.
_DAMPING = 0.01
# Inputs rounded before the update of all others, by one product.
_BLOCK = 64
# Shares of the largest number that are tried as the range of a group.
_RANGES = np.linspace(0.5, 1.0, 11)
# Rows whose grids are fitted together.
_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class Grid:
    """The kind of grid that numbers are rounded to.

    Attributes:
        bits: Of a code.
        group_size: S, numbers of a row that share a scale.
        symmetric: Whether w = scale * code; else w = scale * code + offset.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def half(self) -> int:
        """Codes are at least -half and below half."""
        return 1 << (self.bits - 1)


def round_to_nearest(
    weight: Float[np.ndarray, "J I"], grid: Grid, *, search: bool = False, axis: int = 1
) -> QuantisedMatrix:
    """Round every number to the nearest of its group's grid.

    Args:
        weight: (J, I); with axis 0, (I, J).
        grid: The grid.
        search: Choose ranges that make the mean square error small, instead of those of the largest numbers.
        axis: The axis that groups run along.

    Example:
        >>> weight = np.linspace(-1, 1, 64).reshape(2, 32)
        >>> float(np.abs(round_to_nearest(weight, Grid(8, 32, symmetric=True)).dequantise() - weight).max()) < 0.01
        True
    """
    rows = weight if axis else weight.T
    scales, offsets = _fit_grids(rows, grid, np.ones(rows.shape[1]) if search else None)
    codes = np.empty(rows.shape, np.int8)
    for some in _slabs(len(rows)):
        scale, offset = (_spread(part, some, grid, rows.shape[1]) for part in (scales, offsets))
        assert scale is not None
        codes[some] = _nearest(rows[some].astype(np.float32), scale, offset, grid)
    return _packed(codes.T, scales, offsets, grid, weight.shape, axis)


def round_with_feedback(
    weight: Float[np.ndarray, "J I"],
    second_moment: Float[np.ndarray, "I I"],
    grid: Grid,
    *,
    metric: Float[np.ndarray, "J J"] | None = None,
    axis: int = 1,
) -> QuantisedMatrix:
    """Round with error feedback in the geometry of the inputs, and of the outputs.

    Args:
        weight: (J, I); with axis 0, (I, J).
        second_moment: C of the inputs, symmetric and positive semidefinite.
        grid: The grid.
        metric: G of the outputs, likewise; None rounds every row for itself.
        axis: The axis that groups run along.
    """
    rows = weight if axis else weight.T
    width = rows.shape[1]
    scales, offsets = _fit_grids(rows, grid, np.diag(second_moment))
    order = np.argsort(-np.diag(second_moment), kind="stable")
    outputs = np.arange(len(rows)) if metric is None else np.argsort(-np.diag(metric), kind="stable")
    feedback = _feedback(second_moment[np.ix_(order, order)]).astype(np.float32)
    down = None if metric is None else _feedback(metric[np.ix_(outputs, outputs)]).astype(np.float32)
    # Inputs are rows here, so that each is contiguous.
    left_IxJ = np.ascontiguousarray(rows.T[np.ix_(order, outputs)], np.float32)
    scales_GxJ = scales.T.astype(np.float32)[:, outputs]
    offsets_GxJ = None if offsets is None else offsets.T.astype(np.float32)[:, outputs]
    codes_IxJ = np.empty(left_IxJ.shape, np.int8)
    for start in range(0, width, _BLOCK):
        some = slice(start, min(start + _BLOCK, width))
        groups = order[some] // grid.group_size
        ranges = scales_GxJ[groups], None if offsets_GxJ is None else offsets_GxJ[groups]
        if down is None:
            codes_IxJ[some], errors = _round_rows(left_IxJ[some], feedback[some, some], ranges, grid)
        else:
            codes_IxJ[some], errors = _round_both(left_IxJ[some], feedback[some, some], down, ranges, grid)
        left_IxJ[some.stop :] -= feedback[some, some.stop :].T @ errors
    codes = np.empty_like(codes_IxJ)
    codes[np.ix_(order, outputs)] = codes_IxJ
    return _packed(codes, scales, offsets, grid, weight.shape, axis)


Ranges = tuple[np.ndarray, np.ndarray | None]


def _round_rows(
    block_BxJ: np.ndarray, feedback_BxB: np.ndarray, ranges: Ranges, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some inputs (B), and their errors, without feedback between rows."""
    left_BxJ, (scales_BxJ, offsets_BxJ) = block_BxJ.copy(), ranges
    codes_BxJ, errors_BxJ = np.empty(left_BxJ.shape, np.int8), np.empty_like(left_BxJ)
    for k, w_J in enumerate(left_BxJ):
        offset = None if offsets_BxJ is None else offsets_BxJ[k]
        codes_BxJ[k] = _nearest(w_J, scales_BxJ[k], offset, grid)
        errors_BxJ[k] = w_J - _values(codes_BxJ[k], scales_BxJ[k], offset)
        left_BxJ[k + 1 :] -= feedback_BxB[k, k + 1 :, None] * errors_BxJ[k]
    return codes_BxJ, errors_BxJ


def _round_both(
    block_BxJ: np.ndarray, feedback_BxB: np.ndarray, down_JxJ: np.ndarray, ranges: Ranges, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """The same with feedback between rows.

    A number waits for those before it in its row and in its column: those of an antidiagonal are rounded together. What
    later inputs compensate is the whole change of an input's column, the feedback between its rows included.
    """
    (size, rows), (scales_BxJ, offsets_BxJ) = block_BxJ.shape, ranges
    along_BxB = np.ascontiguousarray(np.triu(feedback_BxB, 1).T)
    down_JxJ = np.ascontiguousarray(np.triu(down_JxJ, 1).T)
    codes_BxJ = np.empty(block_BxJ.shape, np.int8)
    # 0 where nothing is rounded yet.
    errors_JxB, own_BxJ = np.zeros((rows, size), np.float32), np.zeros((size, rows), np.float32)
    for diagonal in range(size + rows - 1):
        k = np.arange(max(0, diagonal - rows + 1), min(size, diagonal + 1))
        j = diagonal - k
        target = block_BxJ[k, j] - np.einsum("nb,nb->n", along_BxB[k], errors_JxB[j])
        w = target - np.einsum("nj,nj->n", down_JxJ[j], own_BxJ[k])
        offset = None if offsets_BxJ is None else offsets_BxJ[k, j]
        codes_BxJ[k, j] = code = _nearest(w, scales_BxJ[k, j], offset, grid)
        value = _values(code, scales_BxJ[k, j], offset)
        errors_JxB[j, k], own_BxJ[k, j] = target - value, w - value
    return codes_BxJ, errors_JxB.T


def conditional_variances(second_moment: Float[np.ndarray, "I I"]) -> Float[np.ndarray, I]:
    """What an error of each input costs once those rounded after it have compensated it.

    The variance of the input given the inputs rounded after it: the diagonal of the LDL decomposition of the damped C
    that rounding with feedback uses.

    Args:
        second_moment: C of the inputs, symmetric and positive semidefinite.

    Returns:
        In the order of rounding, inputs of most energy first.

    Example:
        >>> conditional_variances(np.diag([1.0, 3.0])).round(2).tolist()
        [3.02, 1.02]
    """
    order = np.argsort(-np.diag(second_moment), kind="stable")
    return np.square(np.diag(_upper_triangle(second_moment[np.ix_(order, order)])))


def _feedback(second_moment_IxI: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "I I"]:
    """U with a unit diagonal, upper triangular: what the error of input i changes in the inputs after it.

    C = M M^T with M upper triangular; the rows of M^-1, divided by their diagonals.
    """
    upper = _upper_triangle(second_moment_IxI)
    inverse = scipy.linalg.solve_triangular(upper, np.eye(len(upper)), check_finite=False)
    return np.asarray(inverse / np.diag(inverse)[:, None])


def _upper_triangle(second_moment_IxI: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "I I"]:
    """M, upper triangular, of the damped C = M M^T."""
    floor = _DAMPING * mean_diagonal(second_moment_IxI)
    damped = second_moment_IxI + floor * np.eye(len(second_moment_IxI))
    try:
        return np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(damped)
        clipped = (vectors * np.maximum(values, floor)) @ vectors.T
        return np.linalg.cholesky(clipped[::-1, ::-1])[::-1, ::-1]


def _fit_grids(
    rows_JxI: np.ndarray, grid: Grid, importance_I: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and offsets (J, G) of all groups, in their stored type.

    Of several ranges the one with the least weighted square error; without importance, the whole range.
    """
    width = rows_JxI.shape[1]
    groups = -(-width // grid.group_size)
    pad = groups * grid.group_size - width
    scales, offsets = np.empty((len(rows_JxI), groups)), np.empty((len(rows_JxI), groups))
    weights = None
    if importance_I is not None:
        floored = np.maximum(importance_I, 1e-4 * mean_diagonal(np.diag(importance_I)))
        weights = np.pad(floored, (0, pad)).reshape(groups, -1).astype(np.float32)
    for some in _slabs(len(rows_JxI)):
        # The last number of a short group is repeated: it changes no range, and its weight is 0.
        w_JxGxS = np.pad(rows_JxI[some].astype(np.float32), ((0, 0), (0, pad)), mode="edge")
        w_JxGxS = w_JxGxS.reshape(len(w_JxGxS), groups, -1)
        scales[some], offsets[some] = _best_ranges(w_JxGxS, grid, weights)
    kind = _stored_type(scales if grid.symmetric else np.concatenate([scales, offsets]))
    return scales.astype(kind), None if grid.symmetric else offsets.astype(kind)


def _best_ranges(w_JxGxS: np.ndarray, grid: Grid, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if grid.symmetric:
        # The largest number, whatever its sign, gets the code -half: there are more codes below 0 than above.
        place = np.abs(w_JxGxS).argmax(axis=-1, keepdims=True)
        whole = np.take_along_axis(w_JxGxS, place, axis=-1)[..., 0] / -grid.half
        middle = np.zeros_like(whole)
    else:
        least, most = w_JxGxS.min(axis=-1), w_JxGxS.max(axis=-1)
        whole = (most - least) / (2 * grid.half - 1)
        middle = (most + least) / 2

    def made(share: float) -> tuple[np.ndarray, np.ndarray]:
        # The middle of the codes is -1/2.
        return np.where(whole == 0, 1.0, share * whole), middle if grid.symmetric else middle + share * whole / 2

    if weights is None:
        return made(1.0)
    best, found = np.full(whole.shape, np.inf), made(1.0)
    for share in _RANGES:
        scale, offset = (part.astype(np.float32) for part in made(share))
        code = _nearest(w_JxGxS, scale[..., None], offset[..., None], grid)
        error = w_JxGxS - _values(code, scale[..., None], offset[..., None])
        loss = np.einsum("jgs,gs->jg", error * error, weights)
        better = loss < best
        best = np.where(better, loss, best)
        found = np.where(better, scale, found[0]), np.where(better, offset, found[1])
    return found


def _stored_type(values: np.ndarray) -> np.dtype:
    """float16 where its range suffices, else bfloat16, which has that of float32."""
    sizes = np.abs(values[values != 0])
    limits = np.finfo(np.float16)
    fits = not sizes.size or (sizes.max() < limits.max and sizes.min() > limits.tiny)
    return np.dtype(np.float16) if fits else np.dtype(ml_dtypes.bfloat16)


def _nearest(w: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, grid: Grid) -> Int[np.ndarray, ...]:
    code = np.rint((w if offset is None else w - offset) / scale)
    return np.clip(code, -grid.half, grid.half - 1).astype(np.int8)


def _values(code: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    value = code * scale
    return value if offset is None else value + offset


def _spread(part: np.ndarray | None, some: slice, grid: Grid, width: int) -> np.ndarray | None:
    """Scales or offsets of some rows, repeated for every number of a group."""
    return None if part is None else np.repeat(part[some].astype(np.float32), grid.group_size, axis=1)[:, :width]


def _slabs(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))


def _packed(
    codes_IxJ: np.ndarray,
    scales_JxG: np.ndarray,
    offsets_JxG: np.ndarray | None,
    grid: Grid,
    shape: tuple[int, ...],
    axis: int,
) -> QuantisedMatrix:
    scales, offsets = (None if part is None else np.ascontiguousarray(part.T) for part in (scales_JxG, offsets_JxG))
    assert scales is not None
    whole = np.pad(codes_IxJ, ((0, len(scales) * grid.group_size - len(codes_IxJ)), (0, 0)))
    return QuantisedMatrix(
        pack(whole, grid.bits), scales, offsets, grid.bits, grid.group_size, (shape[0], shape[1]), axis
    )
