"""Factorisation methods: pure functions (weights, statistics, rank) -> states.

Every method here minimises the same thing, the error of a group's stacked weight measured in a geometry of its inputs,

    || (W - Q_out Q_in^T) C^(1/2) ||_F ,

and differs only in C: the identity for plain SVD, a diagonal for FWSVD and ASVD, the second moment of the inputs for
SVD-LLM, that of several layers pooled for Basis Sharing. `ngc` gives every member its own C.

Legend: M outputs of all members stacked, I inputs, R rank. Everything is float64 on the host (LAPACK).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import scipy.linalg

from ngc_jax.convert.statistics import Statistics
from ngc_jax.errors import UsageError

# Relative to the mean diagonal: makes a singular second moment invertible where a square root is needed, and orders
# directions that calibration never saw by the weight's own energy.
RIDGE = 1e-9


@dataclasses.dataclass(frozen=True)
class States:
    """The bilinear states of a group.

    Attributes:
        input_states: (I, R).
        output_states: One (d_out, R) for each member.
    """

    input_states: np.ndarray
    output_states: tuple[np.ndarray, ...]

    def weights(self) -> list[np.ndarray]:
        """The members' weights, each (d_out, I)."""
        return [output @ self.input_states.T for output in self.output_states]


Factorise = Callable[[Sequence[np.ndarray], Sequence[Statistics], int], States]


@dataclasses.dataclass(frozen=True)
class Method:
    """A factorisation method and the recipe its authors use it with.

    Attributes:
        name: As on the command line.
        factorise: (weights (d_out, d_in) of the members, their statistics, rank) -> states.
        topology: The authors' topology.
        needs: What calibration must measure: nothing, the inputs, or the gradients as well.
        rounding: How the rank is made whole.
        reference: Where it comes from.
    """

    name: str
    factorise: Factorise
    topology: str
    needs: Literal["nothing", "inputs", "gradients"]
    rounding: Callable[[float], int] = math.floor
    reference: str = ""


def best_states(weight_MxI: np.ndarray, second_moment_IxI: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact minimiser of || (W - Q_out Q_in^T) C^(1/2) ||_F, by an eigenproblem on the smaller side.

    With fewer outputs than inputs Q_out is the leading eigenvectors U of W C W^T, and C is never inverted nor factored.
    Otherwise U = W L V with L L^T = C + ridge and V the leading eigenvectors of L^T W^T W L. Either way
    Q_in = W^T U, since U has orthonormal columns.

    Args:
        weight_MxI: Stacked weight.
        second_moment_IxI: C; symmetric, positive semidefinite, possibly singular.
        rank: R, at most min(M, I).

    Returns:
        Q_out (M, R) with orthonormal columns, most important first, and Q_in (I, R).
    """
    outputs, inputs = weight_MxI.shape
    if outputs <= inputs:
        output_states = _leading_eigenvectors(_output_gram(weight_MxI, second_moment_IxI), rank)
    else:
        root = square_root(second_moment_IxI)
        stretched = weight_MxI @ root
        leading = _leading_eigenvectors(stretched.T @ stretched, rank)
        output_states, _ = np.linalg.qr(stretched @ leading)
    return output_states, weight_MxI.T @ output_states


def _output_gram(weight: np.ndarray, second_moment: np.ndarray) -> np.ndarray:
    """W C W^T; directions that calibration never reached are ordered by the weight's own energy."""
    return weight @ second_moment @ weight.T + RIDGE * _mean_diagonal(second_moment) * (weight @ weight.T)


def square_root(second_moment: np.ndarray) -> np.ndarray:
    """L with L L^T = C + RIDGE * mean diagonal; Cholesky, or eigenvectors where rounding has made C indefinite."""
    ridged = second_moment + RIDGE * _mean_diagonal(second_moment) * np.eye(len(second_moment))
    try:
        return np.linalg.cholesky(ridged)
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(ridged)
        floor = max(values[-1], 1.0) * np.finfo(np.float64).eps
        return vectors * np.sqrt(np.maximum(values, floor))


def _mean_diagonal(second_moment: np.ndarray) -> float:
    mean = float(np.trace(second_moment)) / len(second_moment)
    return mean if mean > 0 else 1.0


def _leading_eigenvectors(symmetric: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of the `rank` largest eigenvalues, largest first."""
    # Divide and conquer for all of them is several times faster than the driver that can stop at the first few.
    _, vectors = scipy.linalg.eigh((symmetric + symmetric.T) / 2, driver="evd", overwrite_a=True, check_finite=False)
    return vectors[:, -rank:][:, ::-1]


def _stack(weights: Sequence[np.ndarray], geometries: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The stacked members, narrow ones padded with zeros, and their pooled geometry."""
    width = max(weight.shape[1] for weight in weights)
    stacked = np.concatenate([np.pad(w.astype(np.float64), ((0, 0), (0, width - w.shape[1]))) for w in weights])
    pooled = np.zeros((width, width))
    # Members that read the same input add nothing to the pool by being counted again.
    for geometry in {id(g): g for g in geometries}.values():
        pooled[: len(geometry), : len(geometry)] += geometry
    return stacked, pooled


def _split(output_states: np.ndarray, input_states: np.ndarray, weights: Sequence[np.ndarray]) -> States:
    splits = np.cumsum([len(weight) for weight in weights])[:-1]
    return States(input_states, tuple(np.split(output_states, splits)))


def _shared(weights: Sequence[np.ndarray], geometries: Sequence[np.ndarray], rank: int) -> States:
    """Best states of the stacked members in the pooled geometry."""
    stacked, pooled = _stack(weights, geometries)
    return _split(*best_states(stacked, pooled, rank), weights)


def svd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> States:
    """Truncated singular value decomposition: C is the identity."""
    return _shared(weights, [np.eye(weight.shape[1]) for weight in weights], rank)


def fwsvd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> States:
    """FWSVD (arXiv 2207.00112, eq. 6): C is the diagonal of each input's summed Fisher information.

    Raises:
        UsageError: If the statistics have no Fisher information.
    """
    geometries = []
    for entry in statistics:
        if entry.fisher is None:
            raise UsageError("fwsvd needs gradients; calibrate with gradients=True")
        geometries.append(np.diag(entry.fisher))
    return _shared(weights, geometries, rank)


def asvd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int, alpha: float = 0.5) -> States:
    """ASVD (arXiv 2312.05821, eq. 7): inputs scaled by their mean magnitude to the power alpha."""
    return _shared(weights, [np.diag(entry.absolute_mean ** (2 * alpha)) for entry in statistics], rank)


def svd_llm(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> States:
    """SVD-LLM's truncation-aware whitening (arXiv 2403.07378, section 3.1), without its update: C = E[x x^T].

    The authors decompose W S, S the Cholesky factor of C; the same subspace comes from the Gram matrix of W S.
    """
    return _shared(weights, [entry.second_moment for entry in statistics], rank)


def basis_sharing(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> States:
    """Basis Sharing (arXiv 2410.03765, section 3): adjacent layers stacked, their second moments pooled."""
    return _shared(weights, [entry.second_moment for entry in statistics], rank)


def ngc_paper(
    weights: Sequence[np.ndarray],
    statistics: Sequence[Statistics],
    rank: int,
    iterations: int = 4,
    oversampling: int = 10,
    seed: int = 0,
) -> States:
    """The recipe published with NGC (arXiv 2510.16851).

    A low-rank SVD of stacked inputs times stacked weights gives the output states; the input states follow by least
    squares, whose solution is W^T Q_out for orthonormal Q_out. The low-rank SVD is the randomised one (Halko,
    Martinsson and Tropp 2011, algorithm 4.4); its iterations are a choice of ours (docs/results.md). It sees
    Y = X W^T through Y^T Y = W C W^T only. The exact decomposition is what `ngc` uses.

    Args:
        weights: (d_out, d_in) of each member.
        statistics: Of each member.
        rank: R.
        iterations: Power iterations.
        oversampling: Directions sampled beyond the rank.
        seed: Of the sampled directions.
    """
    stacked, pooled = _stack(weights, [entry.second_moment for entry in statistics])
    gram = _output_gram(stacked, pooled)
    generator = np.random.default_rng(seed)
    basis = generator.standard_normal((len(gram), min(rank + oversampling, len(gram))))
    for _ in range(iterations + 1):
        basis, _ = np.linalg.qr(gram @ basis)
    output_states = basis @ _leading_eigenvectors(basis.T @ gram @ basis, rank)
    return _split(output_states, stacked.T @ output_states, weights)


def ngc(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int, sweeps: int = 4) -> States:
    """States that minimise the sum over members of || (W_m - Q_out_m Q_in^T) C_m^(1/2) ||^2.

    Members with the same input: exact. Members with different inputs: alternating least squares with each member's own
    C_m, from the pooled solution (which is what the baselines stop at).
    """
    states = _shared(weights, [entry.second_moment for entry in statistics], rank)
    if len({id(entry.second_moment) for entry in statistics}) == 1:
        return states
    return alternate(weights, [entry.second_moment for entry in statistics], states, sweeps)


def alternate(
    weights: Sequence[np.ndarray], second_moments: Sequence[np.ndarray], states: States, sweeps: int
) -> States:
    """Alternating least squares on shared input states; the loss falls with every sweep.

    Given Q_in, each member's Q_out = W C Q_in (Q_in^T C Q_in)^-1. Given the Q_out, Q_in solves
    sum_m C_m Q_in (Q_out_m^T Q_out_m) = sum_m C_m W_m^T Q_out_m, by conjugate gradients that never form the operator.

    Args:
        weights: (d_out, d_in) of each member.
        second_moments: C of each member, (d_in, d_in).
        states: Where to start.
        sweeps: Number of alternations.
    """
    width, rank = states.input_states.shape
    pads = [(0, width - weight.shape[1]) for weight in weights]
    weights = [np.pad(w.astype(np.float64), ((0, 0), pad)) for w, pad in zip(weights, pads, strict=True)]
    moments = [np.pad(c, (pad, pad)) for c, pad in zip(second_moments, pads, strict=True)]
    targets = [moment @ weight.T for moment, weight in zip(moments, weights, strict=True)]
    input_states, outputs = states.input_states, list(states.output_states)
    for _ in range(sweeps):
        # An orthonormal basis of the same latent space keeps the small systems well-conditioned.
        input_states, _ = np.linalg.qr(input_states)
        for m, (moment, target) in enumerate(zip(moments, targets, strict=True)):
            gram = input_states.T @ moment @ input_states
            gram += RIDGE * max(np.trace(gram) / rank, np.finfo(np.float64).tiny) * np.eye(rank)
            outputs[m] = scipy.linalg.solve(gram, input_states.T @ target, assume_a="pos").T
        grams = [output.T @ output for output in outputs]
        right = sum(target @ output for target, output in zip(targets, outputs, strict=True))

        def operator(x: np.ndarray, grams: Sequence[np.ndarray] = tuple(grams)) -> np.ndarray:
            return sum(moment @ x @ gram for moment, gram in zip(moments, grams, strict=True))

        input_states = _conjugate_gradients(operator, right, input_states)
    return States(input_states, tuple(outputs))


def _conjugate_gradients(
    operator: Callable[[np.ndarray], np.ndarray], right: np.ndarray, x: np.ndarray, steps: int = 20
) -> np.ndarray:
    """Approximately solve operator(x) = right, operator symmetric positive semidefinite on matrices."""
    residual = right - operator(x)
    direction, size = residual, np.vdot(residual, residual)
    target = 1e-20 * np.vdot(right, right)
    for _ in range(steps):
        if size <= target:
            break
        image = operator(direction)
        curvature = np.vdot(direction, image)
        if curvature <= 0:
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        size, previous = np.vdot(residual, residual), size
        direction = residual + (size / previous) * direction
    return x


_PRIVATE = "q-k-v-o-u-g-d"
METHODS = {
    method.name: method
    for method in (
        Method("svd", svd, _PRIVATE, "nothing", reference="Eckart and Young 1936"),
        Method("fwsvd", fwsvd, _PRIVATE, "gradients", reference="arXiv 2207.00112"),
        Method("asvd", asvd, _PRIVATE, "inputs", reference="arXiv 2312.05821"),
        Method("svd_llm", svd_llm, _PRIVATE, "inputs", reference="arXiv 2403.07378"),
        Method("basis_sharing", basis_sharing, "qq-kk-vv-o-uu-gg-d", "inputs", reference="arXiv 2410.03765"),
        Method("ngc_paper", ngc_paper, "qkv-o-ug-d", "inputs", round, reference="arXiv 2510.16851"),
        Method("ngc", ngc, "qkv-o-ug-d", "inputs", reference="this library, docs/conversion.md"),
    )
}
