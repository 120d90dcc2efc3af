"""Fixed points, and checks of Lyapunov functions along a trajectory.

Legend: N numbers in a state, T + 1 states of a trajectory of T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.stability.contraction import Metric, factor_metric
from ngc_jax.stability.flat import State, count_entries, flatten_step, ravel
from ngc_jax.stability.jacobians import LIMIT


class FixedPoint(NamedTuple):
    """A fixed point of a map.

    Attributes:
        state: The state.
        residual: Norm of f(state) - state. Check it: the search may not have converged.
        iterations: Iterations taken.
    """

    state: State
    residual: Float[Array, ""]
    iterations: Array


def fixed_point(
    f: Callable[[State], State],
    guess: State,
    *,
    method: Literal["newton", "iterate"] = "newton",
    iterations: int | None = None,
    tolerance: float | None = None,
    limit: int = LIMIT,
) -> FixedPoint:
    """A fixed point near a guess.

    Newton's method also finds unstable points and forms the Jacobian; it is not damped, so start close. Iterating f
    finds stable points only and forms nothing. Reverse and forward derivatives use the implicit function theorem.

    Args:
        f: A map from a state to a state of the same kind.
        guess: The initial state.
        method: "newton" or "iterate".
        iterations: Maximum number; by default 50 for newton and 10 000 for iterate.
        tolerance: Stop when the residual is below this times (1 + norm of the state); by default 10 rounding errors.
        limit: Largest allowed side of the Jacobian, for newton.

    Raises:
        UsageError: If the method is unknown, the Jacobian is too large, or f does not return a state of the same kind.

    Example:
        >>> found = fixed_point(jnp.cos, jnp.array([1.0]))
        >>> bool(jnp.isclose(found.state[0], 0.739085))
        True
    """
    if method not in ("newton", "iterate"):
        raise UsageError(f"method {method!r} for a fixed point; expected newton or iterate")
    x_N, unravel, flat_step = flatten_step(f, guess)
    N = x_N.size
    if method == "newton" and limit < N:
        raise UsageError(
            f"Newton's method with a Jacobian of {N} a side; expected at most {limit}: use method='iterate'"
        )
    most = iterations if iterations is not None else {"newton": 50, "iterate": 10_000}[method]
    relative = 10 * float(jnp.finfo(x_N.dtype).eps) if tolerance is None else tolerance

    def excess(x_N: Array) -> Array:
        return flat_step(x_N, None) - x_N

    def search(excess: Callable[[Array], Array], x_N: Array) -> tuple[Array, tuple[Array, Array]]:
        def go_on(carry: tuple[Array, Array, Array]) -> Array:
            x_N, excess_N, i = carry
            size = jnp.linalg.norm(excess_N)
            return (i < most) & jnp.isfinite(size) & (size > relative * (1 + jnp.linalg.norm(x_N)))

        def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x_N, excess_N, i = carry
            x_N = x_N + (excess_N if method == "iterate" else -jnp.linalg.solve(jax.jacfwd(excess)(x_N), excess_N))
            return x_N, excess(x_N), i + 1

        x_N, excess_N, i = jax.lax.while_loop(go_on, improve, (x_N, excess(x_N), jnp.asarray(0)))
        # Of floating point: custom_root supports no other derivatives.
        return x_N, (jnp.linalg.norm(excess_N), i.astype(x_N.dtype))

    def solve_tangent(linear: Callable[[Array], Array], y_N: Array) -> Array:
        if method == "iterate":

            def solve(linear: Callable[[Array], Array], y_N: Array) -> Array:
                return search(lambda v_N: linear(v_N) - y_N, -y_N)[0]

            return jax.lax.custom_linear_solve(linear, y_N, solve, solve)
        return jnp.linalg.solve(jax.jacfwd(linear)(y_N), y_N)

    x_N, (residual, i) = jax.lax.custom_root(excess, x_N, search, solve_tangent, has_aux=True)
    return FixedPoint(unravel(x_N), residual, i.astype(jnp.int32))


def quadratic_form(center: State, metric: Metric | None = None) -> Callable[[State], Float[Array, ""]]:
    """The Lyapunov function V(x) = (x - c)^T P (x - c).

    Args:
        center: c, usually a fixed point.
        metric: P for the state's vector, symmetric and positive; None for the identity.

    Returns:
        V.

    Raises:
        UsageError: If the metric does not fit.

    Example:
        >>> quadratic_form(jnp.zeros(2))(jnp.array([3.0, 4.0]))
        Array(25., dtype=float32)
    """
    center_N = ravel(center)[0]
    factor = factor_metric(metric, center_N.size)

    def value(state: State) -> Array:
        away_N = ravel(state)[0] - center_N
        return jnp.sum((away_N if factor is None else factor.T @ away_N) ** 2)

    return value


class Decrease(NamedTuple):
    """The values of a Lyapunov function along a trajectory.

    Attributes:
        values: (T + 1,) of the function.
        increments: (T,) its changes; below zero where it decreases.
        fraction: Share of the counted steps in which it decreases; 1 if none is counted.
        worst_increase: The largest increment of a counted step, 0 if it never increases.
        counted: (T,) the steps that begin above the tolerance.
    """

    values: Float[Array, " s"]
    increments: Float[Array, " t"]
    fraction: Float[Array, ""]
    worst_increase: Float[Array, ""]
    counted: Any


def decrease(
    function: Callable[[State], Float[Array, ""]], trajectory: State, *, rate: float = 0.0, tolerance: float = 0.0
) -> Decrease:
    """Check a Lyapunov function along a trajectory (Lyapunov's direct method, at the visited states only).

    Args:
        function: V, from a state to a number; see `quadratic_form`.
        trajectory: States with a leading axis T + 1.
        rate: Require exponential decrease: V must fall below (1 - rate) V in a step, rather than below V.
        tolerance: Steps that begin with V at or below this are not counted: they have converged, and only rounding
            moves them.

    Raises:
        UsageError: If there are fewer than two states, or the rate is not between 0 and 1.

    Example:
        >>> decrease(quadratic_form(jnp.zeros(1)), jnp.array([[4.0], [2.0], [1.0]])).fraction
        Array(1., dtype=float32)
    """
    if count_entries(trajectory) < 2 or not 0 <= rate < 1:
        raise UsageError(
            f"{count_entries(trajectory)} states and a rate of {rate}; expected at least 2 states and a rate in [0, 1)"
        )
    values = jax.vmap(function)(trajectory)
    increments_T = values[1:] - values[:-1]
    counted_T = values[:-1] > tolerance
    good_T = counted_T & (values[1:] < (1 - rate) * values[:-1])
    count = jnp.sum(counted_T)
    fraction = jnp.where(count > 0, jnp.sum(good_T) / jnp.maximum(count, 1), 1.0)
    worst = jnp.max(jnp.where(counted_T, increments_T, 0.0), initial=0.0)
    return Decrease(values, increments_T, fraction, worst, counted_T)
