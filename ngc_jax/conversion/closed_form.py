"""Optimal states of a group whose members read the same input: exact, for all ranks at once.

The loss of an approximation is the sum over members of || G^(1/2) (W - Q_out Q_in^T) C^(1/2) ||_F^2. C is the second
moment of the inputs, G that of the loss's gradient with respect to the outputs (the identity without gradients).
Given the input states, the best output states are W times a matrix for every G, so G enters only through the pulled
metric H = W^T G W.

Legend: M outputs of all members stacked, I inputs, R rank. Everything is float64 on the host (LAPACK).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from ngc_jax.conversion.statistics import OutputGradients

# Relative to the mean diagonal: makes a singular second moment invertible where a square root is needed, and orders
# directions that calibration never reached by the weight's own energy.
RIDGE = 1e-9
# Relative to the mean diagonal of G: output directions with almost no calibration gradient still count.
DAMPING = 0.1
# The mean square gradient of a block whose output is never read. It is below that of any other block, so that such a
# block gets the remaining budget only, and large enough that its states are not lost to rounding.
_NO_GRADIENT = 1e-12


@dataclasses.dataclass(frozen=True)
class Factors:
    """The bilinear states of a group.

    Attributes:
        input_states: (I, R).
        output_states: One (d_out, R) for each member.
        energies: (R,) loss that each latent dimension saves, in descending order; None if unknown.
        nested: Whether the first columns are what the method would find at a lower rank.
    """

    input_states: np.ndarray
    output_states: tuple[np.ndarray, ...]
    energies: np.ndarray | None = None
    nested: bool = False

    @property
    def rank(self) -> int:
        """Dimension of the latent space."""
        return self.input_states.shape[1]

    def weights(self) -> list[np.ndarray]:
        """The members' weights, each (d_out, I)."""
        return [output @ self.input_states.T for output in self.output_states]

    def truncated(self, rank: int) -> Factors:
        """Keep the first `rank` latent dimensions."""
        energies = None if self.energies is None else self.energies[:rank]
        outputs = tuple(q[:, :rank] for q in self.output_states)
        return Factors(self.input_states[:, :rank], outputs, energies, self.nested)


def best_states(
    weights: Sequence[np.ndarray],
    second_moment_IxI: np.ndarray,
    gradients: Sequence[OutputGradients | None] | None = None,
    *,
    damping: float = DAMPING,
    rank: int | None = None,
) -> Factors:
    """The exact minimiser for members that read the same input, by one eigenproblem on the smaller side.

    With L L^T = G, the eigenvectors U of L^T W C W^T L give Q_out = L^-T U and Q_in = W^T L U, so C is neither inverted
    nor factorised. With L L^T = C, the eigenvectors V of L^T H L give Q_in = L^-T V and Q_out = W L V, so G is not. In
    both cases the eigenvalues are the energies.

    Args:
        weights: (d_out, I) of each member.
        second_moment_IxI: C; symmetric, positive semidefinite, possibly singular.
        gradients: Of each member; None for G = I.
        damping: Added to G, relative to its mean diagonal.
        rank: R; min(M, I) if None. Factors of lower rank are the first columns of those of higher rank.

    Returns:
        Factors with energies.
    """
    gradients = gradients or [None] * len(weights)
    stacked = np.concatenate(weights)
    outputs, inputs = stacked.shape
    rank = min(outputs, inputs) if rank is None else min(rank, outputs, inputs)
    metrics = [output_metric(g, len(w), damping) for w, g in zip(weights, gradients, strict=True)]
    if outputs <= inputs and not any(metric is None for metric in metrics):
        gram = stacked @ second_moment_IxI @ stacked.T
        # Directions that calibration never reached are ordered by the weight's own energy.
        gram += RIDGE * mean_diagonal(second_moment_IxI) * (stacked @ stacked.T)
        roots = [np.diag(np.sqrt(m)) if m.ndim == 1 else square_root(m) for m in metrics if m is not None]
        root = scipy.linalg.block_diag(*roots) if len(roots) > 1 else roots[0]
        energies, leading = eigenvectors(root.T @ gram @ root)
        leading = leading[:, :rank]
        output_states = solve_transposed(root, leading)
        input_states = stacked.T @ (root @ leading)
    else:
        pulled = sum(pulled_metric(w, g, damping) for w, g in zip(weights, gradients, strict=True))
        root = square_root(second_moment_IxI)
        energies, leading = eigenvectors(root.T @ pulled @ root)
        leading = leading[:, :rank]
        input_states = solve_transposed(root, leading)
        output_states = stacked @ (root @ leading)
    return split_members(input_states, output_states, weights, energies[:rank])


def split_members(
    input_states: np.ndarray,
    output_states: np.ndarray,
    weights: Sequence[np.ndarray],
    energies: np.ndarray | None = None,
) -> Factors:
    """Split stacked output states (M, R) by member; nested if the energies are known."""
    splits = np.cumsum([len(weight) for weight in weights])[:-1]
    return Factors(input_states, tuple(np.split(output_states, splits)), energies, nested=energies is not None)


def output_metric(gradients: OutputGradients | None, outputs: int, damping: float = DAMPING) -> np.ndarray | None:
    """G + damping, (M, M), or its diagonal (M,); ones without gradients; None if only W^T G W was measured."""
    if gradients is None:
        return np.ones(outputs)
    floor = damping * _gradient_size(gradients)
    if gradients.second_moment is None:
        return gradients.mean_square + floor
    if len(gradients.second_moment) != outputs:
        return None
    return gradients.second_moment + floor * np.eye(outputs)


def pulled_metric(weight: np.ndarray, gradients: OutputGradients | None, damping: float = DAMPING) -> np.ndarray:
    """H = W^T (G + damping) W, (I, I)."""
    metric = output_metric(gradients, len(weight), damping)
    if metric is None:
        assert gradients is not None
        assert gradients.second_moment is not None
        return gradients.second_moment + damping * _gradient_size(gradients) * (weight.T @ weight)
    return weight.T @ (metric[:, None] * weight if metric.ndim == 1 else metric @ weight)


def square_root(second_moment: np.ndarray) -> np.ndarray:
    """L with L L^T = C + RIDGE * mean diagonal: Cholesky, or eigenvectors if rounding has made C indefinite."""
    ridge = RIDGE * mean_diagonal(second_moment)
    ridged = second_moment + ridge * np.eye(len(second_moment))
    try:
        return np.linalg.cholesky(ridged)
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(ridged)
        return vectors * np.sqrt(np.maximum(values, ridge))


def solve_transposed(root: np.ndarray, right: np.ndarray) -> np.ndarray:
    """L^-T times `right`, for L of `square_root`."""
    if np.triu(root, 1).any():
        return np.linalg.solve(root.T, right)
    return np.asarray(scipy.linalg.solve_triangular(root, right, lower=True, trans=1, check_finite=False))


def mean_diagonal(second_moment: np.ndarray) -> float:
    """The mean of the diagonal; 1 for a zero matrix."""
    return _positive_mean(np.diag(second_moment))


def _gradient_size(gradients: OutputGradients) -> float:
    return float(gradients.mean_square.mean()) or _NO_GRADIENT


def _positive_mean(values: np.ndarray) -> float:
    mean = float(values.mean())
    return mean if mean > 0 else 1.0


def eigenvectors(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (clipped at 0) and eigenvectors, in descending order."""
    # Divide and conquer for all of them is several times faster than the driver that can compute the first few only.
    values, vectors = scipy.linalg.eigh(
        (symmetric + symmetric.T) / 2, driver="evd", overwrite_a=True, check_finite=False
    )
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]
