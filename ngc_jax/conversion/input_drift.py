"""How a block's inputs changed on some tokens, carried over to all: the algebra of error propagation.

Legend: I inputs of a block, M its outputs. x are the dense model's inputs, x' the converted one's, as in `propagate`.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float

from ngc_jax.conversion.closed_form import RIDGE, mean_diagonal

# Correlations of dense and converted inputs are trusted no further than this: R tends to the identity where the two
# have little energy, and where few tokens tell them apart.
_SHRINKAGE = 0.03


def carried_over(
    second_moment: Float[np.ndarray, "I I"],
    own: Float[np.ndarray, "I I"],
    cross: Float[np.ndarray, "I I"],
    converted: Float[np.ndarray, "I I"],
) -> tuple[Float[np.ndarray, "I I"], Float[np.ndarray, "I I"]]:
    """E[x' x'^T] and E[x x'^T] of all tokens, from how some of them changed.

    With x' = B x + rest on those tokens, B by least squares: B C B^T + E[rest rest^T], and C B^T.

    Args:
        second_moment: C = E[x x^T] of all tokens.
        own: E[x x^T] of some.
        cross: E[x x'^T] of the same.
        converted: E[x' x'^T] of the same.
    """
    b_IxI = regression(own, cross.T)
    carried = second_moment @ b_IxI.T
    # E[rest rest^T] = E[x' x'^T] - B E[x x'^T] - E[x' x^T] B^T + B E[x x^T] B^T, from as few products and arrays as do:
    # E[x x^T] B^T = E[x x'^T] + floor (I - B^T), as the equations that B solves say it. They can be solved, for
    # E[x x^T] is a sum of squares.
    floor_I = _SHRINKAGE / (1 - _SHRINKAGE) * _floor(own)
    through = carried - cross
    through -= floor_I[:, None] * b_IxI.T
    through[np.diag_indices_from(through)] += floor_I
    total = b_IxI @ through
    total += converted
    _symmetrise(total)
    return total, carried


def _symmetrise(matrix: np.ndarray, rows: int = 512) -> None:
    """Replace a square matrix by the mean of it and its transpose, in place, a band of rows at a time."""
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
    """W R, with R y the best linear guess of x.

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
        # Carried over from too few tokens to make a second moment of anything: nothing is known of how x changed.
        return np.eye(len(second_moment)) if weight is None else weight
    return np.asarray(scipy.linalg.cho_solve(factor, both.T, overwrite_b=True, check_finite=False)).T


def _floor(second_moment: Float[np.ndarray, "I I"]) -> Float[np.ndarray, " I"]:
    """What a second moment is drawn to."""
    return np.diag(second_moment) + RIDGE * mean_diagonal(second_moment)
