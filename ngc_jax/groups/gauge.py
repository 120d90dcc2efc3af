"""Fix the gauge of a bilinear group: choose the neurons that form its frame of reference.

A bilinear group has W_m = Q_out_m Q_in^T for every member m, and (Q_in A, Q_out_m A^-T) is the same network for every
invertible A. These R^2 numbers are redundant and need not be stored: there is an A that turns the states of R chosen
input neurons, the pivots, into the unit vectors. Only the other I - R input states remain, and the latent dimensions
become interpretable: dimension k is the input that acts as pivot k does.

The choice of pivots determines how well low-precision numbers represent the rest. With Q_in = B Q_in[pivots], the rows
of B are the new states, and pivots of nearly the largest determinant keep every entry of B below a small bound: the
strong rank-revealing factorisation of Gu and Eisenstat, "Efficient algorithms for computing a strong rank-revealing QR
factorization" (1996).

Everything here is float64 NumPy on the host.

Shape suffixes: I input neurons, J output neurons, R rank, O other (not pivot) neurons, T swaps of one round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from ngc_jax.errors import UsageError

# Lower limit on a neuron's size relative to the largest: it avoids divisions by zero, and makes a neuron that is silent
# on the calibration text a pivot only where no other has its direction.
_SMALLEST_SIZE = 1e-6
# A triangle whose diagonal decreases below this ratio counts as singular, and its rank is determined more carefully.
_ILL_CONDITIONED = 1e-10
# Swaps between two updates of all coefficients: few enough that the other rows remain near their bound.
_SWAPS_PER_ROUND = 64

Matrix = NDArray[np.float64]
Indices = NDArray[np.intp]


def fix_gauge(
    input_states: ArrayLike,
    output_states: Sequence[ArrayLike],
    scale: ArrayLike | None = None,
    *,
    bound: float = 2.0,
) -> tuple[tuple[int, ...], Matrix, list[Matrix]]:
    """Choose pivots and transform the states so that the pivots' input states are the unit vectors.

    The weights Q_out Q_in^T do not change, up to rounding. In scaled coordinates, where an input state is multiplied by
    the size of its neuron, every coefficient is at most `bound`: |scale_i rest_ik| <= bound scale_k.

    Where the input states have a rank r below R, r pivots span all of them. The other R - r pivots are the neurons with
    the largest remaining states: each gets a latent dimension that no other neuron uses.

    Args:
        input_states: Q_in (I, R).
        output_states: Q_out (J, R) of every member.
        scale: Typical size (root mean square) of every input neuron (I,); all equal when None.
        bound: Largest permitted coefficient; above 1, since at 1 the search for pivots might not terminate.

    Returns:
        The pivots (R) in ascending order; the input states (I - R, R) of the other neurons, in ascending order; the
        output states (J, R) of every member. In float64.

    Raises:
        UsageError: If a number is not finite, a shape does not fit, R exceeds I, or `bound` is not above 1.
    """
    q_IxR, outputs = np.asarray(input_states, np.float64), [np.asarray(q, np.float64) for q in output_states]
    _check_states(q_IxR, outputs, bound)
    size_I = _sizes(scale, q_IxR.shape[0])
    rank = q_IxR.shape[1]

    # The lengths of Q_in's columns are part of the gauge too. They move to the outputs, so that none counts as small.
    length_R = np.linalg.norm(q_IxR, axis=0)
    q_IxR = q_IxR / np.where(length_R > 0, length_R, 1.0)
    outputs = [q_JxR * length_R for q_JxR in outputs]

    chosen = _choose_pivots(size_I[:, None] * q_IxR, bound)
    if chosen is None:
        q_IxR, mix_RxR = _orthogonal_basis(q_IxR)
        outputs = [q_JxR @ mix_RxR for q_JxR in outputs]
        chosen = _choose_pivots(size_I[:, None] * q_IxR, bound)
        assert chosen is not None, "an orthogonal basis, with sizes within a factor, has full rank"

    rest_IxR = _coefficients(q_IxR, chosen)
    outputs = [q_JxR @ q_IxR[chosen].T for q_JxR in outputs]
    if len(chosen) < rank:
        chosen, rest_IxR, outputs = _add_pivots(chosen, rest_IxR, outputs, size_I, rank)
    order = np.argsort(chosen)
    pivots = tuple(int(index) for index in chosen[order])
    rest_OxR = rest_IxR[other_neurons(pivots, q_IxR.shape[0])][:, order]
    return pivots, rest_OxR, [np.ascontiguousarray(q_JxR[:, order]) for q_JxR in outputs]


def free_gauge(pivots: Sequence[int], rest: ArrayLike, d_in: int) -> NDArray:
    """The input states of all neurons: unit vectors for the pivots, stored states for the others.

    Args:
        pivots: The pivots (R), ascending.
        rest: Input states (I - R, R) of the other neurons, ascending.
        d_in: Number of input neurons I.

    Returns:
        Q_in (I, R), of the type of `rest`.

    Raises:
        UsageError: If the shape of `rest` does not fit.
    """
    rest_OxR, rank = np.asarray(rest), len(pivots)
    if rest_OxR.shape != (d_in - rank, rank):
        raise UsageError(
            f"states of shape {rest_OxR.shape} beside {rank} pivots of {d_in} neurons; expected {(d_in - rank, rank)}"
        )
    return np.concatenate([np.eye(rank, dtype=rest_OxR.dtype), rest_OxR])[stored_rows(pivots, d_in)]


def other_neurons(pivots: Sequence[int], d_in: int) -> Indices:
    """The input neurons that are not pivots, ascending: those whose states are stored."""
    other_I = np.ones(d_in, bool)
    other_I[np.asarray(pivots, np.intp)] = False
    return np.flatnonzero(other_I)


def stored_rows(pivots: Sequence[int], d_in: int) -> Indices:
    """For every input neuron, its row in the matrix of the R unit vectors followed by the stored states."""
    return np.argsort(np.concatenate([np.asarray(pivots, np.intp), other_neurons(pivots, d_in)]))


def _check_states(q_IxR: Matrix, outputs: Sequence[Matrix], bound: float) -> None:
    if q_IxR.ndim != 2 or q_IxR.shape[1] < 1 or q_IxR.shape[1] > q_IxR.shape[0]:
        raise UsageError(
            f"input states of shape {q_IxR.shape}; expected (neurons, rank) with a rank from 1 to the number of neurons"
        )
    for q_JxR in outputs:
        if q_JxR.ndim != 2 or q_JxR.shape[1] != q_IxR.shape[1]:
            raise UsageError(
                f"output states of shape {q_JxR.shape} beside input states of shape {q_IxR.shape};"
                " expected the same rank (columns)"
            )
    if not all(np.isfinite(array).all() for array in (q_IxR, *outputs)):
        raise UsageError("the states have numbers that are not finite; fit them again, or check the weights")
    if not bound > 1:
        raise UsageError(f"bound {bound} on the coefficients; expected a number above 1")


def _sizes(scale: ArrayLike | None, d_in: int) -> Matrix:
    """The neurons' sizes relative to the largest, with a lower limit."""
    if scale is None:
        return np.ones(d_in)
    size_I = np.asarray(scale, np.float64)
    if size_I.shape != (d_in,) or not (np.isfinite(size_I).all() and (size_I >= 0).all()):
        raise UsageError(
            f"scale of shape {size_I.shape} for {d_in} input neurons; expected one finite size of at least 0 for each"
        )
    if size_I.max() == 0:
        return np.ones(d_in)
    return np.maximum(size_I / size_I.max(), _SMALLEST_SIZE)


def _choose_pivots(a_IxR: Matrix, bound: float) -> Indices | None:
    """Rows of a such that all others are linear combinations of them with coefficients within `bound`.

    Returns:
        One row for each column of a; None if a is singular or nearly so.
    """
    rank = a_IxR.shape[1]
    if rank == 0:
        return np.empty(0, np.intp)
    triangle_RxI, order_I = scipy.linalg.qr(a_IxR.T, mode="r", pivoting=True, check_finite=False)
    diagonal_R = np.abs(np.diag(triangle_RxI))
    if diagonal_R.min() <= _ILL_CONDITIONED * diagonal_R.max():
        return None
    pivots, others = order_I[:rank].astype(np.intp), order_I[rank:].astype(np.intp)
    b_OxR = scipy.linalg.solve_triangular(triangle_RxI[:, :rank], triangle_RxI[:, rank:], check_finite=False).T
    b_OxR = np.ascontiguousarray(b_OxR)
    while True:
        # Rounds, for speed: a round updates only the rows that have a coefficient out of bounds, and at its end all
        # coefficients are updated by one large product.
        rows = np.flatnonzero(np.maximum(b_OxR.max(axis=1), -b_OxR.min(axis=1)) > bound) if len(others) else others
        if not len(rows):
            return pivots
        swaps = _find_swaps(b_OxR[rows], bound)
        swap_rows, swap_columns = rows[[row for row, _ in swaps]], np.array([column for _, column in swaps])
        _swap(b_OxR, swap_rows, swap_columns)
        pivots[swap_columns], others[swap_rows] = others[swap_rows], pivots[swap_columns]


def _find_swaps(b_OxR: Matrix, bound: float) -> list[tuple[int, int]]:
    """Pairs (row, column) that can all be swapped; each multiplies the pivots' |determinant| by more than `bound`.

    Hence the search terminates: there are finitely many choices of pivots, and none occurs twice. b is overwritten.
    """
    swaps: list[tuple[int, int]] = []
    rows_left, columns_left = np.ones(b_OxR.shape[0], bool), np.ones(b_OxR.shape[1], bool)
    while len(swaps) < _SWAPS_PER_ROUND:
        allowed_OxR = np.abs(b_OxR)
        # A neuron is swapped once per round: then the round is one change of frame, in closed form.
        allowed_OxR[~rows_left], allowed_OxR[:, ~columns_left] = 0.0, 0.0
        row, column = divmod(int(allowed_OxR.argmax()), b_OxR.shape[1])
        if allowed_OxR[row, column] <= bound:
            break
        swaps.append((row, column))
        rows_left[row] = columns_left[column] = False
        _swap(b_OxR, np.array([row]), np.array([column]))
    return swaps


def _swap(b_OxR: Matrix, rows: Indices, columns: Indices) -> None:
    """Make pivots of the neurons of `rows` (T), in place of those of `columns` (T); in place.

    With E = b[rows] and M = E[:, columns], in the new frame a neuron's coefficients of the new pivots are
    c = b[:, columns] M^-1, and those of the kept pivots are reduced by c E. The old pivots take the places of `rows`.
    """
    e_TxR = b_OxR[rows]
    inverse_TxT = np.linalg.inv(e_TxR[:, columns])
    c_OxT = b_OxR[:, columns] @ inverse_TxT
    b_OxR -= c_OxT @ e_TxR
    b_OxR[:, columns] = c_OxT
    b_OxR[rows] = -inverse_TxT @ e_TxR
    b_OxR[np.ix_(rows, columns)] = inverse_TxT


def _orthogonal_basis(q_IxR: Matrix) -> tuple[Matrix, Matrix]:
    """Q = U C^T with orthonormal columns U (I, r), r the numerical rank, and C (R, r)."""
    u_IxR, triangle_RxR, order_R = scipy.linalg.qr(q_IxR, mode="economic", pivoting=True, check_finite=False)
    diagonal_R = np.abs(np.diag(triangle_RxR))
    found = int(np.count_nonzero(diagonal_R > diagonal_R.max() * max(q_IxR.shape) * np.finfo(np.float64).eps))
    mix_RxR = np.empty((q_IxR.shape[1], found))
    mix_RxR[order_R] = triangle_RxR[:found].T
    return u_IxR[:, :found], mix_RxR


def _coefficients(q_IxR: Matrix, pivots: Indices) -> Matrix:
    """B (I, R) with Q = B Q[pivots], by a new solve: the error of each row is small relative to that row."""
    if not len(pivots):
        return np.zeros_like(q_IxR)
    factors = scipy.linalg.lu_factor(q_IxR[pivots].T, check_finite=False)
    return scipy.linalg.lu_solve(factors, q_IxR.T, check_finite=False).T


def _add_pivots(
    pivots: Indices, rest_IxR: Matrix, outputs: Sequence[Matrix], size_I: Matrix, rank: int
) -> tuple[Indices, Matrix, list[Matrix]]:
    """Add more pivots than the states have dimensions: each new one gets a latent dimension of its own.

    Its column of the formed weights becomes its output states; every other neuron has a coefficient of 0 there.
    """
    others = other_neurons(pivots.tolist(), len(size_I))
    weight_O = np.linalg.norm(rest_IxR[others] * size_I[others, None] / size_I[pivots], axis=1)
    added = others[np.lexsort((others, -size_I[others], -weight_O))][: rank - len(pivots)]
    outputs = [np.concatenate([q_JxR, q_JxR @ rest_IxR[added].T], axis=1) for q_JxR in outputs]
    rest_IxR = np.concatenate([rest_IxR, np.zeros((len(size_I), len(added)))], axis=1)
    return np.concatenate([pivots, added]), rest_IxR, outputs
