"""The potential: the force that drives a trajectory beyond its own dynamics.

The undriven dynamics F0 would take the state x_t to F0(x_t), the actual motion took it to x_(t+1); the potential is the
difference per unit of time,

    u_t = (x_(t+1) - F0(x_t)) / dt.

In the communication dynamics of `ngc_jax.groups.dynamics` this is exactly the input u. If the undriven dynamics is
known only from a recorded trajectory r, its motion r_(t+1) - r_t replaces F0(x_t) - x_t.

Legend: N numbers in a state, K directions of a frame, T steps of a trajectory of T + 1 states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State, Step, count_entries, count_steps, ravel_trajectory, working_type


class Drive(NamedTuple):
    """The potential along a trajectory, and its relation to the undriven motion m_t = (F0(x_t) - x_t) / dt.

    Attributes:
        potential: u, like the states, with a leading axis T.
        undriven: m, likewise. The actual motion is u + m.
        magnitude: (T,) |u|.
        share: (T,) |u| / (|u| + |m|), from 0 (the dynamics alone) to 1 (the potential alone); 0 where nothing moves.
        cosine: (T,) of the angle between u and m: 1 where the potential accelerates the motion, -1 where it opposes it;
            0 where either is zero.
    """

    potential: State
    undriven: State
    magnitude: Float[Array, " t"]
    share: Float[Array, " t"]
    cosine: Float[Array, " t"]


def potential_along(trajectory: State, undriven: Step, *, inputs: Any = None, dt: float = 1.0) -> Drive:
    """The potential of a trajectory over a known undriven dynamics.

    Args:
        trajectory: The actual states, the first included: a pytree with a leading axis T + 1.
        undriven: F0: `undriven(state)`, or `undriven(state, input)` if there are inputs.
        inputs: Inputs of the undriven dynamics itself, with a leading axis T; None for none.
        dt: Duration of a step.

    Returns:
        As in `Drive`. Its rounding error is that of the states, over dt.

    Raises:
        UsageError: If there are fewer than two states, or the shapes do not fit.

    Example:
        >>> driven = jnp.array([[0.0], [1.0], [2.0]])
        >>> potential_along(driven, lambda x: x).potential.ravel().tolist()  # undriven, it would rest
        [1.0, 1.0]
    """
    starts, steps = _starts(trajectory)
    if inputs is None:
        after = jax.vmap(undriven)(starts)
    else:
        count_steps(inputs, steps)
        after = jax.vmap(undriven)(starts, inputs)
    _check_alike(starts, after)
    return _drive(trajectory, jax.tree.map(lambda end, start: (end - start) / dt, after, starts), dt)


def potential_against(trajectory: State, reference: State, *, dt: float = 1.0) -> Drive:
    """The potential of a trajectory over a recorded undriven one: actual motion minus the reference's motion.

    The same as `potential_along` as long as both are at the same state. Once they have separated it also contains the
    difference of the undriven dynamics between the two states.

    Args:
        trajectory: The actual states, with a leading axis T + 1.
        reference: The undriven ones, of the same kind.
        dt: Duration of a step.

    Raises:
        UsageError: If there are fewer than two states, or the shapes do not fit.

    Example:
        >>> driven, undriven = jnp.array([[0.0], [1.0], [2.0]]), jnp.zeros((3, 1))
        >>> potential_against(driven, undriven).potential.ravel().tolist()
        [1.0, 1.0]
    """
    _starts(trajectory)
    _check_alike(trajectory, reference)
    return _drive(trajectory, _motion(reference, dt), dt)


def share_in_span(vectors: State, frames: Float[Array, "t n k"]) -> Float[Array, "t k"]:
    """The share of each vector's squared length in the span of the first directions of a frame.

    With the frames of `lyapunov_spectrum(..., keep_frames=True)` the first k directions span the subspace that the
    past has expanded most; the remainder lies in the more contracting directions. A frame at the end of a step
    belongs to the potential of that step, which acts there. A vector of random direction has the share k / N.

    Args:
        vectors: Such as `Drive.potential`: a pytree with a leading axis T.
        frames: (T, N, K), each with orthonormal columns.

    Returns:
        (T, K): entry k for the first k + 1 directions, from 0 to 1; 0 where a vector is zero.

    Raises:
        UsageError: If the shapes do not fit.

    Example:
        >>> share_in_span(jnp.array([[3.0, 4.0]]), jnp.eye(2)[None]).tolist()  # in the first direction, in both
        [[0.36..., 1.0]]
    """
    vectors_TxN = ravel_trajectory(vectors)
    if jnp.ndim(frames) != 3 or frames.shape[:2] != vectors_TxN.shape:
        raise UsageError(
            f"frames of shape {jnp.shape(frames)} for vectors {vectors_TxN.shape}; expected these two axes "
            "and one more for the directions"
        )
    unit_TxN = _divide(vectors_TxN, _lengths(vectors_TxN)[:, None])
    return jnp.cumsum(jnp.einsum("tn,tnk->tk", unit_TxN, frames) ** 2, axis=1)


def _drive(trajectory: State, undriven: State, dt: float) -> Drive:
    force = jax.tree.map(jnp.subtract, _motion(trajectory, dt), undriven)
    u_TxN, m_TxN = ravel_trajectory(force), ravel_trajectory(undriven)
    u_TxN, m_TxN = (vectors.astype(working_type(u_TxN, m_TxN)) for vectors in (u_TxN, m_TxN))
    u_T, m_T = _lengths(u_TxN), _lengths(m_TxN)
    unit_u_TxN, unit_m_TxN = _divide(u_TxN, u_T[:, None]), _divide(m_TxN, m_T[:, None])
    cosine_T = jnp.clip(jnp.sum(unit_u_TxN * unit_m_TxN, axis=1), -1.0, 1.0)
    return Drive(force, undriven, u_T, _divide(u_T, u_T + m_T), cosine_T)


def _motion(trajectory: State, dt: float) -> State:
    return jax.tree.map(lambda leaf: (leaf[1:] - leaf[:-1]) / dt, trajectory)


def _starts(trajectory: State) -> tuple[State, int]:
    """The states at which steps begin, and their number."""
    states = count_entries(trajectory)
    if states < 2:
        raise UsageError(f"a trajectory of {states} states; expected at least two: a motion needs a start and an end")
    return jax.tree.map(lambda leaf: leaf[:-1], trajectory), states - 1


def _check_alike(one: State, other: State) -> None:
    shapes = [jax.tree.map(jnp.shape, trajectory) for trajectory in (one, other)]
    if shapes[0] != shapes[1]:
        raise UsageError(f"states of shapes {shapes[0]} and undriven ones of {shapes[1]}; expected the same shapes")


def _lengths(vectors_TxN: Array) -> Array:
    """Euclidean lengths; the derivative at 0 is 0."""
    squares_T = jnp.sum(vectors_TxN**2, axis=1)
    return jnp.where(squares_T > 0, jnp.sqrt(jnp.where(squares_T > 0, squares_T, 1.0)), 0.0)


def _divide(over: Array, under: Array) -> Array:
    return jnp.where(under > 0, over / jnp.where(under > 0, under, 1.0), 0.0)
