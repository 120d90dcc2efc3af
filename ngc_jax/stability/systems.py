"""Reference systems with known stability, for testing a measurement.

All are pure functions of a state; `functools.partial` fixes their parameters. Their exponents are:

| system | exponents (natural logarithms per step, or per unit of time) |
|---|---|
| `linear` | log |eigenvalue| |
| `rotation` | 0, 0 |
| `logistic`, r = 4 | log 2 |
| `henon`, a = 1.4, b = 0.3 | 0.4192 and log 0.3 minus that |
| `lorenz`, standard parameters | 0.9056, 0, -14.5723; their sum is -(sigma + 1 + beta) always |
| `gradient_step` at a minimum | log |1 - rate · curvature| |
| `tanh_network`, random | `mean_field_exponent`, for many neurons |

The decimals are those of Sprott (2003, "Chaos and time-series analysis", appendix A).

Legend: N numbers in a state.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State


def linear(matrix: Float[Array, "n n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The linear map x <- A x."""
    return matrix @ x


def rotation(x: Float[Array, " 2"], *, angle: float) -> Float[Array, " 2"]:
    """Turn the plane by an angle in radians."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos * x[0] - sin * x[1], sin * x[0] + cos * x[1]]).astype(x.dtype)


def logistic(x: Float[Array, " ..."], *, r: float = 4.0) -> Float[Array, " ..."]:
    """The logistic map x <- r x (1 - x), elementwise; chaotic on [0, 1] at r = 4 (May 1976, Nature 261:459)."""
    return r * x * (1 - x)


def henon(x: Float[Array, " 2"], *, a: float = 1.4, b: float = 0.3) -> Float[Array, " 2"]:
    """The map (x, y) <- (1 - a x^2 + y, b x) of Hénon (1976, Commun. Math. Phys. 50:69); areas shrink by b."""
    return jnp.stack([1 - a * x[0] ** 2 + x[1], b * x[0]])


def lorenz(
    x: Float[Array, " 3"], *, sigma: float = 10.0, rho: float = 28.0, beta: float = 8.0 / 3.0
) -> Float[Array, " 3"]:
    """The velocity dx/dt of Lorenz (1963, J. Atmos. Sci. 20:130, equations 25 to 27); a step of time is `rk4`."""
    return jnp.stack([sigma * (x[1] - x[0]), x[0] * (rho - x[2]) - x[1], x[0] * x[1] - beta * x[2]])


def rk4(velocity: Callable[[State], State], state: State, *, dt: float) -> State:
    """One step of the classical fourth-order Runge-Kutta method for dx/dt = velocity(x), any pytree."""

    def ahead(slope: State, time: float) -> State:
        return jax.tree.map(lambda x, v: x + time * v, state, slope)

    first = velocity(state)
    second = velocity(ahead(first, dt / 2))
    third = velocity(ahead(second, dt / 2))
    fourth = velocity(ahead(third, dt))
    slope = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth)
    return ahead(slope, dt)


def gradient_step(loss: Callable[[State], Float[Array, ""]], state: State, *, rate: float) -> State:
    """One step of gradient descent, an Euler step of the gradient flow dx/dt = -grad loss with dt = rate.

    The loss is a Lyapunov function of it, and near a minimum every direction decays at its curvature.
    """
    return jax.tree.map(lambda x, slope: x - rate * slope, state, jax.grad(loss)(state))


def random_weights(key: PRNGKeyArray, neurons: int, gain: float) -> Float[Array, "n n"]:
    """The weights of a random network: independent, normal, of variance gain^2 / neurons; spectral radius near gain."""
    return jax.random.normal(key, (neurons, neurons)) * (gain * neurons**-0.5)


def tanh_network(weights: Float[Array, "n n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    """A network of neurons in discrete time, x <- W tanh(x)."""
    return weights @ jnp.tanh(x)


def mean_field_exponent(gain: float) -> float:
    """The largest exponent of `tanh_network` with `random_weights`, for infinitely many neurons.

    Below gain 1 the network falls to the fixed point 0, where the exponent is log gain. Above, activities are
    independent normal numbers from step to step, with variance q = gain^2 E[tanh(sqrt(q) z)^2], and the exponent is
    log(gain^2 E[tanh'(sqrt(q) z)^2]) / 2 > 0: chaos (Molgedey, Schuchhardt and Schuster 1992, Phys. Rev. Lett. 69:3717;
    Engelken, Wolf and Abbott 2023, Phys. Rev. Research 5:043044).

    Raises:
        UsageError: If the gain is not positive.
    """
    if not gain > 0:
        raise UsageError(f"a network with gain {gain}; expected a positive number")
    if gain <= 1:
        return float(np.log(gain))
    # The trapezoidal rule: of exponential accuracy for these integrands, at any gain.
    points = np.linspace(-10, 10, 4001)
    weights = np.exp(-(points**2) / 2)
    weights /= weights.sum()
    # tanh(x)^2 > x^2 - 2 x^4 / 3 bounds q from below.
    least = (1 - gain**-2) / 2
    q = scipy.optimize.brentq(lambda q: gain**2 * weights @ np.tanh(q**0.5 * points) ** 2 - q, least / 2, gain**2)
    slope = 1 - np.tanh(q**0.5 * points) ** 2
    return float(np.log(gain**2 * weights @ slope**2) / 2)
