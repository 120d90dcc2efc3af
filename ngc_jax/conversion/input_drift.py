"""How a block's inputs changed, measured on some tokens and extrapolated to all: the algebra of error propagation.

Legend: I inputs of a block, M its outputs. x are the dense model's inputs, x' the converted one's, as in `propagate`.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float

from ngc_jax.conversion.closed_form import RIDGE, mean_diagonal

# Upper limit on the trusted correlation of dense and converted inputs: R tends to the identity where either has little
# energy, and where there are too few tokens to estimate it.
_SHRINKAGE = 0.03


def carried_over(
    second_moment: Float[np.ndarray, "I I"],
    own: Float[np.ndarray, "I I"],
    cross: Float[np.ndarray, "I I"],
    converted: Float[np.ndarray, "I I"],
) -> tuple[Float[np.ndarray, "I I"], Float[np.ndarray, "I I"]]:
    """E[x' x'^T] and E[x x'^T] of all tokens, from how a sample of them changed.

    With x' = B x + rest on the sample and B by least squares, these are B C B^T + E[rest rest^T] and C B^T.

    Args:
        second_moment: C = E[x x^T] of all tokens.
        own: E[x x^T] of the sample.
        cross: E[x x'^T] of the sample.
        converted: E[x' x'^T] of the sample.
    """
    b_IxI = regression(own, cross.T)
    carried = second_moment @ b_IxI.T
    # E[rest rest^T] = E[x' x'^T] - B E[x x'^T] - E[x' x^T] B^T + B E[x x^T] B^T, with the fewest products and arrays:
    # E[x x^T] B^T = E[x x'^T] + floor (I - B^T) by the equations that define B. They have a solution, since E[x x^T] is
    # a sum of squares.
    floor_I = _SHRINKAGE / (1 - _SHRINKAGE) * _floor(own)
    through = carried - cross
    through -= floor_I[:, None] * b_IxI.T
    through[np.diag_indices_from(through)] += floor_I
    total = b_IxI @ through
    total += converted
    _symmetrise(total)
    return total, carried


def _symmetrise(matrix: np.ndarray, rows: int = 512) -> None:
    """Replace a square matrix by the mean of it and its transpose, in place, one band of rows at a time."""
    for start in range(0, len(matrix), rows):
        band = slice(start, start + rows)
        mean = (matrix[band, start:] + matrix[start:, band].T) / 2
        matrix[band, start:] = mean
        matrix[start:, band] = mean.T


def regression(
    second_moment: Float[np.ndarray, "I I"],
    cross: Float[np.ndarray, "I I"],
    weight: Float[np.ndarray, "M I"] | None = None,
) -> Float[np.ndarray, "M I"]:
    """W R, with R y the best linear estimate of x.

    Args:
        second_moment: E[y y^T].
        cross: E[x y^T].
        weight: W; the identity if None.
    """
    floor = _SHRINKAGE * _floor(second_moment)
    ours = (1 - _SHRINKAGE) * second_moment
    ours[np.diag_indices_from(ours)] += floor
    if weight is None:
        both = (1 - _SHRINKAGE) * cross
        both[np.diag_indices_from(both)] += floor
    else:
        both = (1 - _SHRINKAGE) * (weight @ cross) + weight * floor
    try:
        factor = scipy.linalg.cho_factor(ours, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        # There were too few tokens for a definite second moment: how x changed is unknown.
        return np.eye(len(second_moment)) if weight is None else weight
    return np.asarray(scipy.linalg.cho_solve(factor, both.T, overwrite_b=True, check_finite=False)).T


def _floor(second_moment: Float[np.ndarray, "I I"]) -> Float[np.ndarray, " I"]:
    """The diagonal that a second moment is shrunk towards."""
    return np.diag(second_moment) + RIDGE * mean_diagonal(second_moment)
