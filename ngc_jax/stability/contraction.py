"""Contraction: whether all pairs of nearby trajectories approach one another, in a given metric.

In the metric P = L L^T a displacement d has the length |L^T d|. A step with Jacobian J changes lengths by at most the
factor ||L^T J L^-T||, a flow with Jacobian A at most at the rate of A's matrix measure. If the rate is below some
negative number everywhere in a convex region that trajectories do not leave, all trajectories in it approach one
another (Lohmiller and Slotine 1998, Automatica 34:683, theorem 2, and its form for maps). Along one trajectory it is a
statement about its neighbourhood only.

In the long run the mean rate along a trajectory is never below its largest Lyapunov exponent, whatever the metric; the
best metric is the one that brings them closest.

Legend: N numbers in a state, T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State, Step, vary_like
from ngc_jax.stability.jacobians import LIMIT, jacobians_along, numerical_abscissa

Metric = Float[Array, "n n"]


def matrix_measure(matrix: Float[Array, "n n"], metric: Metric | None = None) -> Float[Array, ""]:
    """The matrix measure (logarithmic norm) of a flow's Jacobian: the fastest growth of a displacement.

    The greatest eigenvalue of the symmetric part of L^T A L^-T.

    Args:
        matrix: A, of dx/dt = A x.
        metric: P, symmetric and positive; None for the identity.

    Returns:
        The rate, in 1 / time; below zero the flow contracts.

    Raises:
        UsageError: If the metric does not fit.

    Example:
        >>> matrix_measure(jnp.array([[-1.0, 0.0], [0.0, -2.0]]))
        Array(-1., dtype=float32)
    """
    return numerical_abscissa(_in_metric(matrix, factor_metric(metric, matrix.shape[-1])))


def contraction_rate(matrix: Float[Array, "n n"], metric: Metric | None = None, *, dt: float = 1.0) -> Float[Array, ""]:
    """The fastest growth of a displacement by one step of a map: log ||L^T J L^-T|| / dt.

    Args:
        matrix: J, the Jacobian of the step.
        metric: P, symmetric and positive; None for the identity.
        dt: Duration of the step.

    Returns:
        The rate, in natural logarithms per unit of time; below zero the step contracts. Minus infinity for J = 0.

    Raises:
        UsageError: If the metric does not fit.

    Example:
        >>> bool(jnp.isclose(contraction_rate(0.5 * jnp.eye(2)), jnp.log(0.5)))
        True
    """
    return jnp.log(jnp.linalg.norm(_in_metric(matrix, factor_metric(metric, matrix.shape[-1])), 2)) / dt


def contraction_rates(
    step: Step,
    states: State,
    metric: Metric | None = None,
    *,
    inputs: Any = None,
    dt: float = 1.0,
    limit: int = LIMIT,
) -> Float[Array, " t"]:
    """The rate of every step along a trajectory; see `contraction_rate`.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        states: The states at which the steps begin, with a leading axis T.
        metric: P for the states' vectors, symmetric and positive; None for the identity.
        inputs: Inputs of the steps, with a leading axis T; None for none.
        dt: Duration of a step.
        limit: Largest allowed side of a Jacobian; beyond it use `top_singular_values`.

    Returns:
        (T,).

    Raises:
        UsageError: If the Jacobian is too large or the metric does not fit.

    Example:
        >>> rates = contraction_rates(lambda x: 0.5 * x, jnp.ones((3, 2)))
        >>> bool(jnp.allclose(rates, jnp.log(0.5)))
        True
    """
    stack_TxNxN = jacobians_along(step, states, inputs=inputs, limit=limit)
    factor = factor_metric(metric, stack_TxNxN.shape[-1])
    norms_T = jax.vmap(lambda matrix: jnp.linalg.norm(_in_metric(matrix, factor), 2))(stack_TxNxN)
    return jnp.log(norms_T) / dt


def lyapunov_metric(matrix: Float[Array, "n n"], rate: float | None = None) -> Metric:
    """A metric in which a linear map contracts at a given rate, although it may not in the Euclidean one.

    P solves the discrete Lyapunov equation (A / e^rate)^T P (A / e^rate) - P = -I, so that A^T P A < e^(2 rate) P.

    Works on the host in float64.

    Args:
        matrix: A, (N, N).
        rate: Above the logarithm of A's spectral radius; None for half of that logarithm, for which A must be stable.

    Returns:
        P (N, N) of trace N.

    Raises:
        UsageError: If no metric has that rate.

    Example:
        >>> shear = jnp.array([[0.5, 3.0], [0.0, 0.5]])  # stable, although it lengthens some displacements
        >>> contraction_rate(shear) > 0, contraction_rate(shear, lyapunov_metric(shear)) < 0
        (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    a_NxN = np.asarray(matrix, np.float64)
    with np.errstate(divide="ignore"):
        least = float(np.log(np.abs(np.linalg.eigvals(a_NxN)).max()))
    if rate is None:
        # A nilpotent matrix contracts at any rate.
        rate = max(least / 2, -1.0) if least < 0 else least
    if not rate > least:
        raise UsageError(
            f"a metric with rate {rate:.4g} for a map whose spectral radius has the logarithm {least:.4g}; expected a "
            "rate above that: a map with eigenvalues outside the unit circle contracts in no metric"
        )
    # SciPy's equation is M X M^H - X + Q = 0.
    p_NxN = scipy.linalg.solve_discrete_lyapunov(a_NxN.T * np.exp(-rate), np.eye(len(a_NxN)))
    return jnp.asarray((p_NxN + p_NxN.T) * len(a_NxN) / (2 * np.trace(p_NxN)), jnp.asarray(matrix).dtype)


class MetricFit(NamedTuple):
    """A learned metric.

    Attributes:
        metric: P (N, N), of trace N.
        rate: The largest contraction rate of the steps in it.
        history: (iterations,) the largest rate before each gradient step.
    """

    metric: Metric
    rate: Float[Array, ""]
    history: Float[Array, " i"]


def fit_metric(
    jacobians: Float[Array, "t n n"],
    *,
    start: Metric | None = None,
    iterations: int = 500,
    learning_rate: float = 0.05,
    sharpness: float = 1000.0,
    dt: float = 1.0,
) -> MetricFit:
    """A constant metric in which the worst step of a trajectory contracts as fast as possible.

    Adam on L, lower triangular with positive diagonal, P = L L^T. The maximum over steps and singular values s is
    smoothed as log(sum of s^p) / p, with p growing from 10 to `sharpness`. The best metric of all iterations is
    returned, so that it is never worse than the start. The rate holds for these Jacobians; a metric with a lower rate
    may exist.

    Args:
        jacobians: (T, N, N) of the steps, as from `jacobians_along`.
        start: Initial P; None for the identity.
        iterations: Gradient steps.
        learning_rate: Initial learning rate of Adam, with a cosine decay to zero.
        sharpness: Of the smooth maximum at the end.
        dt: Duration of a step.

    Raises:
        UsageError: If the Jacobians are not a stack of square matrices, or the start does not fit.

    Example:
        >>> shear = jnp.array([[0.5, 3.0], [0.0, 0.5]])
        >>> fit = fit_metric(shear[None], iterations=50)
        >>> fit.rate < contraction_rate(shear)
        Array(True, dtype=bool)
    """
    if jacobians.ndim != 3 or jacobians.shape[1] != jacobians.shape[2]:
        raise UsageError(f"Jacobians of shape {jacobians.shape}; expected a stack (T, N, N) of square ones")
    N = jacobians.shape[-1]
    factor_NxN = factor_metric(start, N)
    factor_NxN = jnp.eye(N) if factor_NxN is None else factor_NxN
    factor_NxN = vary_like(factor_NxN.astype(jacobians.dtype), jacobians)
    log_diagonal_N = jnp.log(jnp.diagonal(factor_NxN))
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations))

    def build(parameters: tuple[Array, Array]) -> Array:
        below_NxN, log_diagonal_N = parameters
        return jnp.tril(below_NxN, -1) + jnp.diag(jnp.exp(log_diagonal_N))

    def rates(parameters: tuple[Array, Array], p: Array) -> tuple[Array, Array]:
        factor_NxN = build(parameters)
        s_TxN = jnp.linalg.svd(jax.vmap(lambda one: _in_metric(one, factor_NxN))(jacobians), compute_uv=False)
        largest = jax.lax.stop_gradient(jnp.max(s_TxN))
        relative_TxN = s_TxN / jnp.where(largest > 0, largest, 1.0)
        smooth = jnp.log(largest) + jnp.log(jnp.sum(relative_TxN**p)) / p
        return smooth / dt, jnp.log(largest) / dt

    def descend(carry: tuple[Any, Any, Array, Any], p: Array) -> tuple[tuple[Any, Any, Array, Any], Array]:
        parameters, moments, least, best = carry
        (_, rate), gradients = jax.value_and_grad(rates, has_aux=True)(parameters, p)
        best = jax.tree.map(lambda new, old: jnp.where(rate < least, new, old), parameters, best)
        updates, moments = optimiser.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments, jnp.minimum(rate, least), best), rate

    parameters = (factor_NxN, log_diagonal_N)
    least = vary_like(jnp.asarray(jnp.inf, jacobians.dtype), jacobians)
    carry = (parameters, optimiser.init(parameters), least, parameters)
    sharpness_I = jnp.geomspace(min(10.0, sharpness), sharpness, iterations, dtype=jacobians.dtype)
    (_, _, least, best), history = jax.lax.scan(descend, carry, sharpness_I)
    metric_NxN = build(best) @ build(best).T
    return MetricFit(metric_NxN * N / jnp.trace(metric_NxN), least, history)


def factor_metric(metric: Metric | None, size: int) -> Float[Array, "n n"] | None:
    """L with L L^T = P, lower triangular; None for None.

    Raises:
        UsageError: If P is not of that size or, if its values are known (outside of jit), not symmetric and
            positive.
    """
    if metric is None:
        return None
    if jnp.shape(metric) != (size, size):
        raise UsageError(f"a metric of shape {jnp.shape(metric)} for {size} numbers; expected ({size}, {size})")
    if not isinstance(metric, jax.core.Tracer):
        p_NxN = np.asarray(metric, np.float64)
        least = np.linalg.eigvalsh(p_NxN)[0]
        if not np.allclose(p_NxN, p_NxN.T, rtol=1e-4, atol=1e-6 * np.abs(p_NxN).max()) or not least > 0:
            raise UsageError(f"a metric with least eigenvalue {least:.3g}; expected a symmetric, positive matrix")
    return jnp.linalg.cholesky(jnp.asarray(metric))


def _in_metric(matrix_NxN: Array, factor_NxN: Array | None) -> Array:
    """L^T J L^-T."""
    if factor_NxN is None:
        return matrix_NxN
    transposed = jax.scipy.linalg.solve_triangular(factor_NxN, (factor_NxN.T @ matrix_NxN).T, lower=True)
    return transposed.T
