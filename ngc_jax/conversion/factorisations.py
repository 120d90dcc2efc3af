"""Factorisations: pure functions (weights, statistics, rank) -> states.

Each minimises the error of a group's stacked weight matrix, measured in a geometry of its inputs and one of its
outputs,

    || G^(1/2) (W - Q_out Q_in^T) C^(1/2) ||_F ,

and they differ only in C and G. C is the identity for plain SVD, a diagonal for FWSVD and ASVD, the second moment of
the inputs for SVD-LLM, and the pooled second moment of several layers for Basis Sharing; G is the identity for all of
these. `ngc` gives every member its own C and its own G.

Legend: M outputs of all members stacked, I inputs, R rank. Everything is float64 on the host (LAPACK).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ngc_jax.conversion.state import Needs
from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.conversion.closed_form import Factors
    from ngc_jax.conversion.statistics import Statistics

Factorise = Callable[[Sequence[np.ndarray], "Sequence[Statistics]", int], "Factors"]


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """A function from weights and statistics to states, and the statistics that it needs.

    Attributes:
        name: As in `factorise(name)`.
        function: The function.
        measures: What calibration must measure.
        rounding: How a uniform rank is rounded to an integer.
        reference: The publication that it comes from.
    """

    name: str
    function: Factorise
    measures: Needs
    rounding: Callable[[float], int] = math.floor
    reference: str = ""


def _stack(weights: Sequence[np.ndarray], geometries: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The stacked members, zero-padded to the same width, and the sum of the geometries."""
    width = max(weight.shape[1] for weight in weights)
    stacked = np.concatenate([np.pad(w.astype(np.float64), ((0, 0), (0, width - w.shape[1]))) for w in weights])
    pooled = np.zeros((width, width))
    for geometry in geometries:
        pooled[: len(geometry), : len(geometry)] += geometry
    return stacked, pooled


def same_input(statistics: Sequence[Statistics]) -> bool:
    """Whether all blocks read the same input."""
    sites = {entry.site for entry in statistics}
    return len(statistics) == 1 or (len(sites) == 1 and "" not in sites)


def _second_moments(statistics: Sequence[Statistics]) -> list[np.ndarray]:
    """One second moment for each input site: members that read the same input are counted once in a pool."""
    by_site = {entry.site or str(number): entry.second_moment for number, entry in enumerate(statistics)}
    return list(by_site.values())


def _shared(weights: Sequence[np.ndarray], geometries: Sequence[np.ndarray], rank: int) -> Factors:
    """Optimal states of the stacked members in the pooled geometry."""
    from ngc_jax.conversion.closed_form import best_states, split_members

    stacked, pooled = _stack(weights, geometries)
    states = best_states([stacked], pooled, rank=rank)
    return split_members(states.input_states, states.output_states[0], weights, states.energies)


def svd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> Factors:
    """Truncated singular value decomposition: C is the identity."""
    return _shared(weights, [np.eye(weight.shape[1]) for weight in weights], rank)


def fwsvd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> Factors:
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


def asvd(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int, alpha: float = 0.5) -> Factors:
    """ASVD (arXiv 2312.05821, eq. 7): inputs scaled by their mean magnitude to the power alpha."""
    return _shared(weights, [np.diag(entry.absolute_mean ** (2 * alpha)) for entry in statistics], rank)


def svd_llm(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> Factors:
    """SVD-LLM's truncation-aware whitening (arXiv 2403.07378, section 3.1) without its parameter update: C = E[x x^T].

    The authors decompose W S with S the Cholesky factor of C; the Gram matrix of W S gives the same subspace.
    """
    return _shared(weights, _second_moments(statistics), rank)


def basis_sharing(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int) -> Factors:
    """Basis Sharing (arXiv 2410.03765, section 3): adjacent layers are stacked and their second moments pooled."""
    return _shared(weights, _second_moments(statistics), rank)


def ngc_paper(
    weights: Sequence[np.ndarray],
    statistics: Sequence[Statistics],
    rank: int,
    iterations: int = 4,
    oversampling: int = 10,
    seed: int = 0,
) -> Factors:
    """The recipe published with NGC (arXiv 2510.16851).

    A low-rank SVD of stacked inputs times stacked weights gives the output states. The input states follow by least
    squares, whose solution is W^T Q_out for orthonormal Q_out. The low-rank SVD is the randomised one (Halko,
    Martinsson and Tropp 2011, algorithm 4.4); we choose its number of iterations (docs/measured.md). It depends on
    Y = X W^T only through Y^T Y = W C W^T. `ngc` uses the exact decomposition.

    Args:
        weights: (d_out, d_in) of each member.
        statistics: Of each member.
        rank: R.
        iterations: Power iterations.
        oversampling: Directions sampled beyond the rank.
        seed: For the sampled directions.
    """
    from ngc_jax.conversion.closed_form import RIDGE, eigenvectors, mean_diagonal, split_members

    stacked, pooled = _stack(weights, _second_moments(statistics))
    gram = stacked @ pooled @ stacked.T + RIDGE * mean_diagonal(pooled) * (stacked @ stacked.T)
    generator = np.random.default_rng(seed)
    basis = generator.standard_normal((len(gram), min(rank + oversampling, len(gram))))
    for _ in range(iterations + 1):
        basis, _ = np.linalg.qr(gram @ basis)
    output_states = basis @ eigenvectors(basis.T @ gram @ basis)[1][:, :rank]
    return split_members(stacked.T @ output_states, output_states, weights)


def ngc(weights: Sequence[np.ndarray], statistics: Sequence[Statistics], rank: int, sweeps: int = 4) -> Factors:
    """States that minimise the sum over members of || G_m^(1/2) (W_m - Q_out_m Q_in^T) C_m^(1/2) ||^2.

    Members with the same input have an exact, nested solution. Members with different inputs are solved by alternating
    least squares with each member's own C_m and G_m, starting from the pooled solution (where the baselines stop).
    Without gradients in the statistics G is the identity.

    Args:
        weights: (d_out, d_in) of each member.
        statistics: Of each member.
        rank: R. At full rank the pooled solution is returned with its energies, from which ranks are allocated.
        sweeps: Number of alternating least squares sweeps.
    """
    from ngc_jax.conversion.alternating import alternate, pooled_states
    from ngc_jax.conversion.closed_form import best_states, pulled_metric

    moments = [entry.second_moment for entry in statistics]
    gradients = [entry.gradients for entry in statistics]
    if same_input(statistics):
        return best_states(weights, moments[0], gradients, rank=rank)
    pulled = [pulled_metric(weight, g) for weight, g in zip(weights, gradients, strict=True)]
    states = pooled_states(weights, moments, pulled)
    if rank >= states.rank:
        return states
    return alternate(weights, moments, states.truncated(rank), sweeps, pulled)


_INPUTS = Needs(inputs=True)
_GRADIENTS = Needs(inputs=True, gradients="full")
FACTORISATIONS = {
    one.name: one
    for one in (
        Factorisation("svd", svd, Needs(), reference="Eckart and Young 1936"),
        Factorisation("fwsvd", fwsvd, Needs(inputs=True, fisher=True), reference="arXiv 2207.00112"),
        Factorisation("asvd", asvd, _INPUTS, reference="arXiv 2312.05821"),
        Factorisation("svd_llm", svd_llm, _INPUTS, reference="arXiv 2403.07378"),
        Factorisation("basis_sharing", basis_sharing, _INPUTS, reference="arXiv 2410.03765"),
        Factorisation("ngc_paper", ngc_paper, _INPUTS, round, reference="arXiv 2510.16851"),
        Factorisation("ngc_inputs", ngc, _INPUTS, reference="this library, docs/conversion.md, with G the identity"),
        Factorisation("ngc", ngc, _GRADIENTS, reference="this library, docs/conversion.md"),
    )
}
