"""Jacobians of a step: formed if they are small, applied without being formed if they are large.

A map is any pure function of a state, a pytree; a step with parameters is `functools.partial(step, params)`. The
functions of a matrix take one Jacobian; stacks of them are one `jax.vmap`.

Legend: N numbers in a state, M in what the map returns, T states, K directions, B of a Krylov block, S of a basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State, Step, count_steps, flatten_map, vary_like, working_type

# A float32 matrix of this side takes 64 MiB.
LIMIT = 4096


def jacobian(f: Callable[[State], State], state: State, *, limit: int = LIMIT) -> Float[Array, "m n"]:
    """The Jacobian of a map, by one forward derivative for each number of the state.

    Args:
        f: A map from states to states, possibly of another structure.
        state: Where to evaluate it.
        limit: Largest allowed side of the matrix.

    Returns:
        (M, N): the derivative of output number m by state number n, both counted as `ravel_pytree` does.

    Raises:
        UsageError: If the matrix is larger than the limit.

    Example:
        >>> jacobian(lambda x: x**2, jnp.array([1.0, 3.0])).tolist()
        [[2.0, 0.0], [0.0, 6.0]]
    """
    x_N, flat = flatten_map(f, state)
    M, N = jax.eval_shape(flat, x_N).size, x_N.size
    if max(M, N) > limit:
        raise UsageError(
            f"a Jacobian of shape ({M}, {N}); expected at most {limit} a side: use top_singular_values or "
            "lyapunov_spectrum, which do not form it, or raise limit"
        )
    return jax.jacfwd(flat)(x_N)


def jacobians_along(step: Step, states: State, *, inputs: Any = None, limit: int = LIMIT) -> Float[Array, "t m n"]:
    """The Jacobian at every state of a trajectory, one after the other.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        states: The states at which steps begin; the leaves have a leading axis T.
        inputs: Inputs of the steps, with a leading axis T; None for none.
        limit: Largest allowed side of a matrix.

    Returns:
        (T, M, N).

    Raises:
        UsageError: If a matrix is larger than the limit, or the numbers of inputs and states differ.

    Example:
        >>> jacobians_along(lambda x: x**2, jnp.array([[1.0], [3.0]])).ravel().tolist()
        [2.0, 6.0]
    """
    count_steps((states, inputs), None)
    if inputs is None:
        return jax.lax.map(lambda state: jacobian(step, state, limit=limit), states)
    return jax.lax.map(
        lambda pair: jacobian(lambda state: step(state, pair[1]), pair[0], limit=limit), (states, inputs)
    )


def singular_values(matrix: Float[Array, "m n"]) -> Float[Array, " k"]:
    """The singular values, greatest first: the factors by which one step stretches the axes of a small ball.

    Example:
        >>> singular_values(jnp.diag(jnp.array([1.0, 3.0]))).tolist()
        [3.0, 1.0]
    """
    return jnp.linalg.svd(matrix, compute_uv=False)


def spectral_radius(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """The greatest modulus of an eigenvalue: the growth per step of many steps with the same Jacobian.

    Eigenvalues of general matrices are not available on TPU: move the matrix to the host's CPU first.

    Example:
        >>> spectral_radius(jnp.diag(jnp.array([0.5, -2.0])))
        Array(2., dtype=float32)
    """
    return jnp.max(jnp.abs(jnp.linalg.eigvals(matrix)))


def henrici_departure(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """Departure of a matrix from normality, between 0 (normal) and 1 (nilpotent).

    sqrt(||A||_F^2 - sum |eigenvalue|^2) / ||A||_F: the departure from normality of Henrici (1962, "Bounds for
    iterates, inverses, spectral variation and fields of values of non-normal matrices") in the Frobenius norm,
    relative to that norm. The zero matrix has 0.

    Example:
        >>> henrici_departure(jnp.array([[0.0, 1.0], [0.0, 0.0]]))
        Array(1., dtype=float32)
    """
    total = jnp.sum(matrix**2)
    rest = jnp.maximum(total - jnp.sum(jnp.abs(jnp.linalg.eigvals(matrix)) ** 2), 0.0)
    return jnp.sqrt(rest / jnp.where(total > 0, total, 1.0))


def numerical_abscissa(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """The greatest eigenvalue of (A + A^T) / 2: how fast dx/dt = A x can grow at once, in 1 / time.

    The matrix measure of the Euclidean norm (Trefethen and Embree 2005, "Spectra and pseudospectra", section 17).

    Example:
        >>> numerical_abscissa(jnp.diag(jnp.array([-1.0, -3.0])))
        Array(-1., dtype=float32)
    """
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]


def kreiss_lower_bound(
    matrix: Float[Array, "n n"],
    *,
    radii: Float[Array, " r"] | None = None,
    angles: int = 64,
) -> Float[Array, ""]:
    """A lower bound of the Kreiss constant, and so of the transient growth max_n ||A^n||.

    The constant is the supremum over |z| > 1 of (|z| - 1) ||(z - A)^-1||; here the maximum over a grid. Transient
    growth is at least the constant and at most e N times that (Trefethen and Embree 2005, section 18). A normal
    contraction has 1; if the spectral radius exceeds 1 the constant is infinite and this number is meaningless.

    Args:
        matrix: A, real.
        radii: |z| of the grid; by default 20 from 1.001 to 11.
        angles: arg z of the grid, from 0 to pi.

    Example:
        >>> kreiss_lower_bound(0.5 * jnp.eye(2)), kreiss_lower_bound(jnp.array([[0.5, 9.0], [0.0, 0.5]])) > 4
        (Array(1., dtype=float32), Array(True, dtype=bool))
    """
    radii_R = 1 + jnp.logspace(-3, 1, 20, dtype=matrix.dtype) if radii is None else jnp.asarray(radii)
    circle_A = jnp.exp(1j * jnp.linspace(0, np.pi, angles, dtype=matrix.dtype))
    identity_NxN = jnp.eye(matrix.shape[0], dtype=matrix.dtype)

    def least(z: Array) -> Array:
        return jnp.linalg.svd(z * identity_NxN - matrix, compute_uv=False)[-1]

    least_RxA = jax.lax.map(lambda radius: jax.vmap(least)(radius * circle_A), radii_R)
    return jnp.maximum(jnp.max((radii_R[:, None] - 1) / least_RxA), 1.0)


class TopSingularValues(NamedTuple):
    """Leading singular values and vectors of a Jacobian.

    Attributes:
        values: (K,) greatest first.
        right: (N, K) the most stretched directions.
        left: (M, K) their images.
        residuals: (K,) norms of J^T u - s v: a singular value of J lies within this distance of each value.
    """

    values: Float[Array, " k"]
    right: Float[Array, "n k"]
    left: Float[Array, "m k"]
    residuals: Float[Array, " k"]


def top_singular_values(
    f: Callable[[State], State],
    state: State,
    k: int,
    key: PRNGKeyArray,
    *,
    iterations: int = 10,
    oversample: int = 4,
) -> TopSingularValues:
    """The leading singular values of a map's Jacobian, without forming it.

    Randomised block Krylov iteration (Musco and Musco 2015, arXiv 1504.05477, algorithm 2). The map is linearised
    once; every iteration applies the Jacobian and its transpose to a block of k + oversample directions. The basis,
    N · (k + oversample) · (iterations + 1) numbers, is kept. If it would have N columns or more, the whole Jacobian
    is used instead, and the result is exact.

    The derivative of a value is that of u^T J v at fixed vectors: exact for converged values that are not repeated.
    Vectors have no derivative.

    Args:
        f: A map from states to states, possibly of another structure.
        state: Where to evaluate it.
        k: Number of singular values.
        key: Random key of the first block.
        iterations: Applications of J^T J; check the residuals.
        oversample: Directions of a block beyond k.

    Raises:
        UsageError: If there are not k singular values, or a number is out of range.

    Example:
        >>> top = top_singular_values(lambda x: jnp.arange(1.0, 6.0) * x, jnp.ones(5), 2, jax.random.key(0))
        >>> bool(jnp.allclose(top.values, jnp.array([5.0, 4.0]), rtol=1e-4))
        True
    """
    x_N, flat = flatten_map(f, state)
    y_M, push = jax.linearize(flat, x_N)
    if not 1 <= k <= min(x_N.size, y_M.size) or iterations < 1 or oversample < 0:
        raise UsageError(
            f"{k} singular values of a Jacobian of shape ({y_M.size}, {x_N.size}) by {iterations} iterations with "
            f"{oversample} more directions; expected k from 1 to the smaller side, iterations >= 1, oversample >= 0"
        )
    pull = jax.linear_transpose(push, x_N)
    kind = working_type(x_N, y_M)

    def apply(v_NxB: Array) -> Array:
        return jax.vmap(push, 1, 1)(v_NxB.astype(x_N.dtype)).astype(kind)

    def apply_transpose(u_MxB: Array) -> Array:
        return jax.vmap(lambda u_M: pull(u_M)[0], 1, 1)(u_MxB.astype(y_M.dtype)).astype(kind)

    width = k + oversample
    if width * (iterations + 1) >= x_N.size:
        basis_NxS = vary_like(jnp.eye(x_N.size, dtype=kind), x_N)
    else:
        block_NxB = jnp.linalg.qr(jax.random.normal(key, (x_N.size, width), kind))[0]
        block_NxB = vary_like(block_NxB, x_N)
        basis_NxS = _krylov(lambda v_NxB: apply_transpose(apply(v_NxB)), block_NxB, iterations)
    left_MxS, _, turn_SxS = jnp.linalg.svd(apply(basis_NxS), full_matrices=False)
    left_MxK = jax.lax.stop_gradient(left_MxS[:, :k])
    right_NxK = jax.lax.stop_gradient(basis_NxS @ turn_SxS[:k].T)
    values_K = jnp.sum(left_MxK * apply(right_NxK), axis=0)
    residuals_K = jnp.linalg.norm(apply_transpose(left_MxK) - right_NxK * values_K, axis=0)
    return TopSingularValues(values_K, right_NxK, left_MxK, jax.lax.stop_gradient(residuals_K))


def _krylov(normal: Callable[[Array], Array], block_NxB: Array, iterations: int) -> Array:
    """An orthonormal basis (N, B · (iterations + 1)) of the block and its images under powers of J^T J."""
    N, B = block_NxB.shape
    empty_NxS = vary_like(jnp.zeros((N, B * (iterations + 1)), block_NxB.dtype), block_NxB)

    def extend(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        basis_NxS, block_NxB = carry
        basis_NxS = jax.lax.dynamic_update_slice(basis_NxS, block_NxB, (0, i * B))
        block_NxB = normal(block_NxB)
        # Three times: where the rank of J is exhausted, the first pass leaves rounding errors, the second turns them
        # into arbitrary directions, and the third removes their components in the basis's span.
        for _ in range(3):
            block_NxB = jnp.linalg.qr(block_NxB - basis_NxS @ (basis_NxS.T @ block_NxB))[0]
        return (basis_NxS, block_NxB), None

    (basis_NxS, block_NxB), _ = jax.lax.scan(extend, (empty_NxS, block_NxB), jnp.arange(iterations))
    return jax.lax.dynamic_update_slice(basis_NxS, block_NxB, (0, iterations * B))
