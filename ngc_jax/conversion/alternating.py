"""States of a group whose members read different inputs: alternating least squares with each member's own geometry.

The loss is the sum over members of || G_m^(1/2) (W_m - Q_out_m Q_in^T) C_m^(1/2) ||_F^2. Given Q_in, the best output
states are Q_out_m = W_m X_m with X_m = C_m Q_in (Q_in^T C_m Q_in)^-1. Everything else therefore needs only C_m and the
pulled metric H_m = W_m^T G_m W_m.

Legend: I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from ngc_jax.conversion.closed_form import (
    RIDGE,
    Factors,
    eigenvectors,
    mean_diagonal,
    solve_transposed,
    square_root,
)
from ngc_jax.errors import UsageError

# Relative threshold below which values cannot be distinguished from rounding error.
_RESOLVED = 1e-6


def pad_square(matrix: np.ndarray, width: int) -> np.ndarray:
    """A square matrix with zero rows and columns appended."""
    return np.pad(matrix, ((0, width - len(matrix)),) * 2)


def pooled_states(
    weights: Sequence[np.ndarray], second_moments: Sequence[np.ndarray], pulled: Sequence[np.ndarray]
) -> Factors:
    """Nested input states of the pooled geometry, with each member's own best output states.

    The input states are exact if the sums of the C_m and of the H_m stand in for each member's own matrices. The output
    states and the energies are those of the true loss.

    Args:
        weights: (d_out, d_in) of each member; members with fewer inputs count as zero-padded.
        second_moments: C of each member, (d_in, d_in).
        pulled: H of each member, (d_in, d_in).

    Returns:
        Factors of rank at most I with the true energies, in the pooled order.
    """
    width = max(weight.shape[1] for weight in weights)
    moments = [positive_definite(c) for c in second_moments]
    root = square_root(np.sum([pad_square(c, width) for c in moments], axis=0))
    _, leading = eigenvectors(root.T @ sum(pad_square(h, width) for h in pulled) @ root)
    rank = min(sum(len(weight) for weight in weights), width)
    input_states = solve_transposed(root, leading[:, :rank])
    energies = np.zeros(rank)
    outputs = []
    for weight, moment, metric in zip(weights, moments, pulled, strict=True):
        own = input_states[: weight.shape[1]]
        triangle = _triangle(own.T @ moment @ own, own, moment)
        # Orthonormal in C, and nested: the first r columns span what the first r input states span.
        basis = scipy.linalg.solve_triangular(triangle, own.T, lower=True).T
        reached = moment @ basis
        energies += np.einsum("ir,ij,jr->r", reached, metric, reached, optimize=True)
        outputs.append(weight @ reached @ np.linalg.inv(triangle))
    return Factors(input_states, tuple(outputs), energies)


def _triangle(gram: np.ndarray, input_states: np.ndarray, second_moment: np.ndarray) -> np.ndarray:
    """A lower triangle T with T T^T = Q^T C Q + ridge, given Q^T C Q."""
    ridge = _ridge(gram)
    try:
        triangle = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
    except np.linalg.LinAlgError:
        triangle = np.zeros_like(gram)
    diagonal = np.square(np.diag(triangle))
    if diagonal.min() > _RESOLVED * diagonal.max():
        return triangle
        # The member has no energy on these inputs: rounding hides that in the product, but not in its factor.
    factor = np.concatenate([square_root(second_moment).T @ input_states, np.sqrt(ridge) * np.eye(len(gram))])
    return np.asarray(np.linalg.qr(factor, mode="r")).T


def positive_definite(second_moment: np.ndarray) -> np.ndarray:
    """C with its ridge; eigenvalues that rounding made negative (fewer tokens than inputs) are removed first.

    Works for any symmetric matrix that is positive semidefinite up to rounding.
    """
    ridged = second_moment + RIDGE * mean_diagonal(second_moment) * np.eye(len(second_moment))
    try:
        np.linalg.cholesky(ridged)
    except np.linalg.LinAlgError:
        root = square_root(second_moment)
        return root @ root.T
    return ridged


def best_outputs(weight: np.ndarray, second_moment: np.ndarray, input_states: np.ndarray) -> np.ndarray:
    """Output states (d_out, R) that minimise a member's loss for given input states (I, R); the same for every G."""
    own = input_states[: weight.shape[1]]
    return weight @ _regression(second_moment, own)


def _regression(second_moment: np.ndarray, input_states: np.ndarray) -> np.ndarray:
    """X = C Q (Q^T C Q)^-1, (I, R)."""
    reached = second_moment @ input_states
    triangle = _triangle(input_states.T @ reached, input_states, second_moment)
    return np.asarray(scipy.linalg.cho_solve((triangle, True), reached.T, check_finite=False)).T


def _ridge(gram: np.ndarray) -> float:
    return RIDGE * mean_diagonal(gram)


def alternate(
    weights: Sequence[np.ndarray],
    second_moments: Sequence[np.ndarray],
    states: Factors,
    sweeps: int,
    pulled: Sequence[np.ndarray] | None = None,
) -> Factors:
    """Alternating least squares on shared input states; the loss decreases with every sweep.

    Given the X_m, Q_in solves sum_m C_m Q_in (X_m^T H_m X_m) = sum_m C_m H_m X_m. Two members are solved in the
    coordinates that make both terms diagonal, more by preconditioned conjugate gradients that never form the operator.

    Args:
        weights: (d_out, d_in) of each member.
        second_moments: C of each member, (d_in, d_in).
        states: The initial states.
        sweeps: Number of alternations.
        pulled: H of each member, (d_in, d_in); W^T W if None.

    Raises:
        UsageError: If the statistics are not finite.
    """
    width = states.input_states.shape[0]
    weights = [weight.astype(np.float64) for weight in weights]
    pulled = [weight.T @ weight for weight in weights] if pulled is None else pulled
    metrics = [pad_square(h, width) for h in pulled]
    if not all(np.isfinite(matrix).all() for matrix in (*second_moments, *metrics)):
        raise UsageError("the statistics of a shared group are not finite; load the model with --dtype float32")
    second_moments = [positive_definite(c) for c in second_moments]
    moments = [pad_square(c, width) for c in second_moments]
    targets = [moment @ metric for moment, metric in zip(moments, metrics, strict=True)]
    input_states = states.input_states
    pair = _both_diagonal(*moments) if len(moments) == 2 else None
    pooled = None if pair else _factor(np.sum(moments, axis=0))
    for _ in range(sweeps):
        input_states = _orthonormal(input_states)
        regressions = [_regression(moment, input_states) for moment in moments]
        grams = [x.T @ metric @ x for x, metric in zip(regressions, metrics, strict=True)]
        right = sum(target @ x for target, x in zip(targets, regressions, strict=True))

        def operator(x: np.ndarray, grams: Sequence[np.ndarray] = tuple(grams)) -> np.ndarray:
            return sum(moment @ x @ gram for moment, gram in zip(moments, grams, strict=True))

        if pair:
            input_states = input_states + _solve_pair(pair, _both_diagonal(*grams), right - operator(input_states))
        else:
            factors = pooled, _factor(np.sum(grams, axis=0))
            input_states = _conjugate_gradients(operator, right, input_states, factors)
    input_states = _orthonormal(input_states)
    outputs = [best_outputs(w, c, input_states) for w, c in zip(weights, second_moments, strict=True)]
    return Factors(input_states, tuple(outputs))


def _orthonormal(input_states: np.ndarray) -> np.ndarray:
    """A basis of the same latent space that keeps the small systems well-conditioned."""
    return np.linalg.qr(input_states)[0]


def _both_diagonal(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and d in [0, 1] with A^T first A = diag(1 - d) and A^T second A = diag(d)."""
    both = positive_definite(first + second)
    shares, coordinates = scipy.linalg.eigh(second, both, driver="gvd", check_finite=False)
    return coordinates, np.clip(shares, 0.0, 1.0)


def _solve_pair(
    left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], target: np.ndarray
) -> np.ndarray:
    """X with first X first' + second X second' = target, each side's two matrices given by `_both_diagonal`."""
    (a, d), (b, e) = left, right
    scale = np.outer(1 - d, 1 - e) + np.outer(d, e)
    # Where only one member has the input and carries nothing in the latent dimension, X is free: it is not changed.
    scale = np.where(scale > _RESOLVED, scale, np.inf)
    return a @ ((a.T @ target @ b) / scale) @ b.T


def _factor(total: np.ndarray) -> Any:
    return scipy.linalg.cho_factor(positive_definite(total), check_finite=False)


def _conjugate_gradients(
    operator: Callable[[np.ndarray], np.ndarray], right: np.ndarray, x: np.ndarray, factors: Any, steps: int = 20
) -> np.ndarray:
    """Approximately solve operator(x) = right, operator symmetric positive semidefinite on matrices.

    The preconditioner is (sum of left factors) x (sum of right factors), which equals the operator if all its terms
    are alike. `factors` are the Cholesky factors of the two sums.
    """

    def precondition(residual: np.ndarray) -> np.ndarray:
        half = scipy.linalg.cho_solve(factors[0], residual, check_finite=False)
        return np.asarray(scipy.linalg.cho_solve(factors[1], half.T, check_finite=False)).T

    residual = right - operator(x)
    direction = precondition(residual)
    size = np.vdot(residual, direction)
    target = 1e-12 * size
    for _ in range(steps):
        if size <= target:
            break
        image = operator(direction)
        curvature = np.vdot(direction, image)
        if curvature <= 0:
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        preconditioned = precondition(residual)
        size, previous = np.vdot(residual, preconditioned), size
        direction = preconditioned + (size / previous) * direction
    return x
