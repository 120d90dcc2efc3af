"""Pairs of trajectories: growth of a perturbation of finite size, without derivatives.

An estimate of the largest exponent that shares only the averaging with `lyapunov.py`, and works if a step has no useful
derivative.

Legend: N numbers in a state, K pairs, T steps, E steps between renormalisations, L = T / E intervals.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State, Step, count_entries, count_steps, flatten_step, ravel_trajectory
from ngc_jax.stability.lyapunov import LyapunovSpectrum, check_frame, in_intervals


def pair_exponents(
    step: Step,
    state: State,
    directions: Float[Array, "n k"],
    *,
    steps: int | None = None,
    inputs: Any = None,
    transient: int = 0,
    every: int = 1,
    distance: float | None = None,
) -> LyapunovSpectrum:
    """The largest exponent from K pairs of trajectories with regular renormalisation.

    Every pair is the trajectory and a neighbour, which is returned along their difference to the given distance after
    every interval (Benettin, Galgani and Strelcyn 1976, Phys. Rev. A 14:2338). All pairs share the one trajectory, and
    each gives an estimate of the largest exponent; unlike the frame of `lyapunov_spectrum` they are not kept
    orthogonal.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        state: The initial state.
        directions: (N, K) of the perturbations, as from `random_frame`; their lengths are ignored.
        steps: Number of steps to measure; may be left out if there are inputs.
        inputs: Inputs that drive both trajectories: a pytree with a leading axis of transient + steps entries.
        transient: Number of steps before the measured ones.
        every: Steps between renormalisations.
        distance: Between the trajectories after renormalisation. By default the square root of the type's rounding
            times the length of the first state (or 1 where that is zero), which balances rounding and curvature.

    Returns:
        As `lyapunov_spectrum`, where a column is a pair and `frame` holds the unit vectors to the neighbours. A rate is
        minus infinity if a neighbour reached the trajectory exactly; it restarts in its old direction.

    Raises:
        UsageError: As `lyapunov_spectrum`, and if the distance is not positive.

    Example:
        >>> run = pair_exponents(lambda x: 0.5 * x, jnp.ones(3), jnp.eye(3)[:, :2], steps=10)
        >>> bool(jnp.allclose(run.exponents, jnp.log(0.5), atol=1e-3))
        True
    """
    steps = count_steps(inputs, steps, transient=transient, every=every)
    x_N, unravel, flat_step = flatten_step(step, state, inputs)
    frame_NxK = _unit(check_frame(directions, x_N).astype(x_N.dtype))
    size = _distance(distance, x_N)

    def interval(carry: tuple[Array, Array], inputs_E: Any) -> tuple[tuple[Array, Array], Array]:
        x_N, frame_NxK = carry
        neighbours_NxK = x_N[:, None] + size * frame_NxK
        # The rounded offsets, not the exact ones.
        before_K = jnp.linalg.norm(neighbours_NxK - x_N[:, None], axis=0)

        def run(x_N: Array) -> Array:
            return jax.lax.scan(lambda x_N, input_: (flat_step(x_N, input_), None), x_N, inputs_E, length=every)[0]

        x_N = run(x_N)
        offsets_NxK = jax.vmap(run, 1, 1)(neighbours_NxK) - x_N[:, None]
        after_K = jnp.linalg.norm(offsets_NxK, axis=0)
        met_K = after_K == 0
        frame_NxK = jnp.where(met_K, frame_NxK, offsets_NxK / jnp.where(met_K, 1.0, after_K))
        return (x_N, frame_NxK), jnp.log(after_K / before_K)

    (x_N, frame_NxK), growth_LxK = jax.lax.scan(
        interval, (x_N, frame_NxK), in_intervals(inputs, every), length=(transient + steps) // every
    )
    return LyapunovSpectrum.of(growth_LxK[transient // every :] / every, unravel(x_N), frame_NxK)


def separation_curves(
    step: Step,
    state: State,
    directions: Float[Array, "n k"],
    *,
    steps: int | None = None,
    inputs: Any = None,
    distance: float | None = None,
) -> Float[Array, "t k"]:
    """Growth of K perturbations after each step, never renormalised.

    At first the slope of a curve is the largest exponent; it levels off when the distance reaches the size of the
    attractor, or, in a contraction, that of rounding.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        state: The initial state.
        directions: (N, K) of the perturbations; their lengths are ignored.
        steps: Number of steps; may be left out if there are inputs.
        inputs: Inputs that drive both trajectories: a pytree with a leading axis T.
        distance: Size of the perturbations; by default as in `pair_exponents`.

    Returns:
        (T, K) natural logarithms of the distance over the first distance.

    Raises:
        UsageError: As `pair_exponents`.

    Example:
        >>> curves = separation_curves(lambda x: 2 * x, jnp.ones(3), jnp.eye(3)[:, :1], steps=4)
        >>> bool(jnp.allclose(curves[:, 0], jnp.log(2) * jnp.arange(1, 5), atol=1e-3))
        True
    """
    steps = count_steps(inputs, steps)
    x_N, _, flat_step = flatten_step(step, state, inputs)
    frame_NxK = _unit(check_frame(directions, x_N).astype(x_N.dtype))
    neighbours_NxK = x_N[:, None] + _distance(distance, x_N) * frame_NxK
    before_K = jnp.linalg.norm(neighbours_NxK - x_N[:, None], axis=0)

    def both(carry: tuple[Array, Array], input_: Any) -> tuple[tuple[Array, Array], Array]:
        x_N, neighbours_NxK = carry
        x_N = flat_step(x_N, input_)
        neighbours_NxK = jax.vmap(lambda neighbour_N: flat_step(neighbour_N, input_), 1, 1)(neighbours_NxK)
        return (x_N, neighbours_NxK), jnp.linalg.norm(neighbours_NxK - x_N[:, None], axis=0)

    distances_TxK = jax.lax.scan(both, (x_N, neighbours_NxK), inputs, length=steps)[1]
    return jnp.log(distances_TxK / before_K)


def distances(one: State, other: State) -> Float[Array, " t"]:
    """The Euclidean distance between two recorded trajectories, state by state.

    Args:
        one: A pytree with a leading axis T.
        other: Another of the same kind.

    Returns:
        (T,).

    Raises:
        UsageError: If their structures or shapes differ.

    Example:
        >>> distances(jnp.zeros((2, 2)), jnp.array([[3.0, 4.0], [0.0, 1.0]]))
        Array([5., 1.], dtype=float32)
    """
    shapes = [jax.tree.map(jnp.shape, trajectory) for trajectory in (one, other)]
    if shapes[0] != shapes[1]:
        raise UsageError(f"trajectories of shapes {shapes[0]} and {shapes[1]}; expected the same shapes")
    count_entries(one)
    return jnp.linalg.norm(ravel_trajectory(one) - ravel_trajectory(other), axis=1)


def _unit(vectors_NxK: Array) -> Array:
    lengths_K = jnp.linalg.norm(vectors_NxK, axis=0)
    return vectors_NxK / jnp.where(lengths_K > 0, lengths_K, 1.0)


def _distance(distance: float | None, x_N: Array) -> Array:
    if distance is None:
        length = jnp.linalg.norm(x_N)
        return jnp.finfo(x_N.dtype).eps ** 0.5 * jnp.where(length > 0, length, 1.0)
    if not distance > 0:
        raise UsageError(f"pairs at a distance of {distance}; expected a positive number")
    return jnp.asarray(distance, x_N.dtype)
