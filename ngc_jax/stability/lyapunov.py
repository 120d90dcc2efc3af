"""Finite-time Lyapunov exponents: the growth rates of small perturbations along a trajectory.

k perturbations are the columns of an orthonormal frame Q. A step pushes them forward by its Jacobian, J Q = Q' R, and
the exponents are the means of log |R_ii| over the steps (Benettin et al. 1980, Meccanica 15:9; Eckmann and
Ruelle 1985, Rev. Mod. Phys. 57:617, section V.C). k exponents cost k forward derivatives a step; no Jacobian is formed.

With many steps the mean is the Lyapunov exponent, whatever the frame was. With few, as along the depth of a network, it
depends on the frame: let transient steps turn the frame first, or use the singular values of all steps as one map
(`top_singular_values`), whose logarithms over the time are the finite-time exponents that do not depend on a frame.

Legend: N numbers in a state, K exponents, T steps, E steps between orthonormalisations, L = T / E intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.stability.flat import State, Step, count_steps, flatten_step, ravel, vary_like, working_type

# In units of the rounding of a pushed-forward direction: components outside the span of the previous directions that
# are below this count as zero.
RESOLUTION = 16.0


class LyapunovSpectrum(NamedTuple):
    """Exponents and their convergence; rates are natural logarithms per step, or per unit of time after `per_time`.

    Exponents are in the order of the frame's columns, which is descending up to fluctuations.

    Attributes:
        exponents: (K,) mean growth rates. Minus infinity where a direction was lost (a singular Jacobian).
        standard_errors: (K,) of the exponents, from batch means; see `standard_error`.
        local: (L, K) growth rates of the intervals, the local exponents.
        running: (L, K) exponents after each interval: the convergence curve.
        state: The state after the last step.
        frame: (N, K) the frame there: with `state`, where to continue.
        frames: (L, N, K) the frame at the end of every interval if requested, else None. (A tuple of frames from
            `lyapunov_of_maps`.)
    """

    exponents: Float[Array, " k"]
    standard_errors: Float[Array, " k"]
    local: Float[Array, "l k"]
    running: Float[Array, "l k"]
    state: State
    frame: Float[Array, "n k"]
    frames: Any = None

    def per_time(self, dt: float) -> LyapunovSpectrum:
        """The same spectrum in rates per unit of time.

        Args:
            dt: Duration of a step.
        """
        rates = ("exponents", "standard_errors", "local", "running")
        return self._replace(**{name: getattr(self, name) / dt for name in rates})

    @classmethod
    def of(cls, local_LxK: Array, state: State, frame: Array, frames: Any = None) -> LyapunovSpectrum:
        """The spectrum of given local exponents, for instance of those of two runs, concatenated."""
        counts_L = jnp.arange(1, local_LxK.shape[0] + 1, dtype=local_LxK.dtype)
        running_LxK = jnp.cumsum(local_LxK, axis=0) / counts_L[:, None]
        exponents_K = jnp.mean(local_LxK, axis=0)
        return cls(exponents_K, standard_error(local_LxK), local_LxK, running_LxK, state, frame, frames)


def random_frame(key: PRNGKeyArray, state: State, k: int) -> Float[Array, "n k"]:
    """Random orthonormal directions in a state's space.

    Args:
        key: Random key.
        state: Any state, for its size and type.
        k: Number of directions.

    Returns:
        (N, K), uniformly distributed, at least float32.

    Raises:
        UsageError: If k is not between 1 and the number of numbers in the state.

    Example:
        >>> random_frame(jax.random.key(0), jnp.zeros(5), 2).shape
        (5, 2)
    """
    x_N = ravel(state)[0]
    if not 1 <= k <= x_N.size:
        raise UsageError(f"{k} directions in a state of {x_N.size} numbers; expected 1 to {x_N.size}")
    return jnp.linalg.qr(jax.random.normal(key, (x_N.size, k), working_type(x_N)))[0]


def orthonormalise(vectors_NxK: Float[Array, "n k"]) -> tuple[Float[Array, "n k"], Float[Array, " k"]]:
    """QR decomposition: an orthonormal frame of the vectors and the logarithms of |R_ii|.

    If a vector lies in the span of those before it to within its rounding, the logarithm is minus infinity and the
    frame gets an arbitrary direction orthogonal to the others.

    Example:
        >>> frame, growth = orthonormalise(jnp.diag(jnp.array([4.0, 0.5])))
        >>> growth.tolist() == [jnp.log(4.0), jnp.log(0.5)]
        True
    """
    frame_NxK, r_KxK = jnp.linalg.qr(vectors_NxK)
    left_K = jnp.abs(jnp.diagonal(r_KxK))
    lengths_K = jnp.max(jnp.abs(r_KxK), axis=0)
    lost_K = left_K <= RESOLUTION * jnp.finfo(r_KxK.dtype).eps * lengths_K
    return frame_NxK, jnp.where(lost_K, -jnp.inf, jnp.log(jnp.where(lost_K, 1.0, left_K)))


def lyapunov_spectrum(
    step: Step,
    state: State,
    frame: Float[Array, "n k"],
    *,
    steps: int | None = None,
    inputs: Any = None,
    transient: int = 0,
    every: int = 1,
    keep_frames: bool = False,
) -> LyapunovSpectrum:
    """The leading Lyapunov exponents of a map, of a driven map, or of a flow seen at intervals.

    Pure: jit it, vmap it over states, differentiate it with respect to whatever `step` closes over. The derivative is
    that of the finite computation, transient included; over many steps of a chaotic map it grows without bound, and it
    is not defined where a direction was lost.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        state: The initial state.
        frame: (N, K) perturbations to follow, as from `random_frame`, or the frame of an earlier run.
        steps: Number of steps to measure; may be left out if there are inputs.
        inputs: Inputs that drive the steps: a pytree with a leading axis of transient + steps entries. None for none.
        transient: Number of steps before the measured ones, which bring state and frame to their long-run behaviour.
        every: Steps between orthonormalisations. The directions must not become parallel to within rounding meanwhile.
        keep_frames: Whether to return the frames of all intervals: N · K numbers each.

    Returns:
        Exponents per step, and the rest of `LyapunovSpectrum`; of a flow, `per_time` converts them.

    Raises:
        UsageError: If the state is not of floating point, a step does not return a state of the same kind, or frame,
            steps, inputs, transient and every do not fit.

    Example:
        >>> from ngc_jax.stability import systems
        >>> run = lyapunov_spectrum(systems.henon, jnp.array([0.1, 0.1]), jnp.eye(2), steps=5000, transient=100)
        >>> abs(run.exponents[0] - 0.419) < 0.02, abs(run.exponents.sum() - jnp.log(0.3)) < 1e-3
        (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    steps = count_steps(inputs, steps, transient=transient, every=every)
    x_N, unravel, flat_step = flatten_step(step, state, inputs)
    frame_NxK = check_frame(frame, x_N)

    def one_step(carry: tuple[Array, Array], input_: Any) -> tuple[tuple[Array, Array], None]:
        x_N, vectors_NxK = carry
        after_N, push = jax.linearize(lambda x_N: flat_step(x_N, input_), x_N)
        pushed_NxK = jax.vmap(push, 1, 1)(vectors_NxK.astype(x_N.dtype))
        return (after_N, pushed_NxK.astype(vectors_NxK.dtype)), None

    def interval(carry: tuple[Array, Array], inputs_E: Any) -> tuple[tuple[Array, Array], Any]:
        (x_N, vectors_NxK), _ = jax.lax.scan(one_step, carry, inputs_E, length=every)
        frame_NxK, growth_K = orthonormalise(vectors_NxK)
        return (x_N, frame_NxK), (growth_K, frame_NxK if keep_frames else None)

    skipped = transient // every
    (x_N, frame_NxK), (growth_LxK, frames) = jax.lax.scan(
        interval,
        (x_N, orthonormalise(frame_NxK)[0]),
        in_intervals(inputs, every),
        length=(transient + steps) // every,
    )
    frames = frames[skipped:] if keep_frames else None
    return LyapunovSpectrum.of(growth_LxK[skipped:] / every, unravel(x_N), frame_NxK, frames)


def lyapunov_of_maps(
    maps: Sequence[Callable[[State], State]],
    state: State,
    frame: Float[Array, "n k"],
    *,
    keep_frames: bool = False,
) -> LyapunovSpectrum:
    """Growth rates along a sequence of different maps, such as the layers of a network.

    Each map may lead into another space, with at least K numbers; a rate then compares lengths in two spaces. The maps
    are traced one by one: use `lyapunov_spectrum` with inputs if one function serves all steps.

    Args:
        maps: Pure functions, the first of which takes `state`.
        state: The initial state.
        frame: (N, K) perturbations to follow, as from `random_frame`.
        keep_frames: Whether to return the frame after every map, as a tuple.

    Returns:
        As `lyapunov_spectrum`, with one interval for each map.

    Raises:
        UsageError: If there are no maps, a state is not of floating point or has fewer than K numbers, or the frame
            does not fit.

    Example:
        >>> run = lyapunov_of_maps([lambda x: 2 * x, lambda x: x / 8], jnp.ones(3), jnp.eye(3)[:, :1])
        >>> run.exponents  # the mean of log 2 and log 1/8: log 1/2
        Array([-0.6931472], dtype=float32)
    """
    if not maps:
        raise UsageError("a sequence of no maps; expected at least one")
    frame_NxK = orthonormalise(check_frame(frame, ravel(state)[0]))[0]
    K = frame_NxK.shape[1]
    growths, frames = [], []
    for index, one in enumerate(maps):
        x_N, unravel = ravel(state)
        state, push = jax.linearize(one, state)
        if (size := ravel(state)[0].size) < K:
            raise UsageError(
                f"map {index} leads into a space of {size} numbers; expected at least the {K} of the frame"
            )
        columns = frame_NxK.astype(x_N.dtype)
        vectors_NxK = jax.vmap(lambda v_N, push=push, unravel=unravel: ravel(push(unravel(v_N)))[0], 1, 1)(columns)
        frame_NxK, growth_K = orthonormalise(vectors_NxK.astype(frame_NxK.dtype))
        growths.append(growth_K)
        frames.append(frame_NxK)
    return LyapunovSpectrum.of(jnp.stack(growths), state, frame_NxK, tuple(frames) if keep_frames else None)


def check_frame(frame: Float[Array, "n k"], x_N: Array) -> Float[Array, "n k"]:
    """The frame as an array of the type in which frames are computed.

    Raises:
        UsageError: If it is not a matrix of at least one and at most N columns for the N numbers of the state.
    """
    if jnp.ndim(frame) != 2 or jnp.shape(frame)[0] != x_N.size or not 1 <= jnp.shape(frame)[1] <= x_N.size:
        raise UsageError(
            f"a frame of shape {jnp.shape(frame)} for a state of {x_N.size} numbers; expected ({x_N.size}, k) with k "
            f"from 1 to {x_N.size}: use random_frame"
        )
    return vary_like(jnp.asarray(frame, working_type(x_N, frame)), x_N)


def in_intervals(inputs: Any, every: int) -> Any:
    """Inputs with a leading axis T as intervals of steps: leading axes (T / every, every)."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, every, *jnp.shape(leaf)[1:])), inputs)


def standard_error(series: Float[Array, "l k"]) -> Float[Array, " k"]:
    """The standard error of the mean of correlated series, by non-overlapping batch means.

    The number of batches is the square root of the length, but at most 32; it is right once a batch is longer than the
    correlations (Flegal and Jones 2010, Ann. Statist. 38:1034). Entries at the start that do not fill a batch are
    left out. Infinite if it cannot be estimated: for fewer than two entries, or if one is infinite.

    Args:
        series: (L, K).

    Example:
        >>> standard_error(jnp.array([[1.0], [3.0]]))
        Array([1.], dtype=float32)
    """
    length = series.shape[0]
    batches = min(int(length**0.5), 32) if length >= 4 else length
    if batches < 2:
        return jnp.full(series.shape[1:], jnp.inf, series.dtype)
    known_K = jnp.all(jnp.isfinite(series), axis=0)
    series = jnp.where(known_K, series, 0.0)[length % batches :]
    means_BxK = jnp.mean(series.reshape(batches, -1, *series.shape[1:]), axis=1)
    return jnp.where(known_K, _deviation(means_BxK) / batches**0.5, jnp.inf)


def _deviation(means_BxK: Array) -> Array:
    """The standard deviation of a sample, with derivative 0 where all are equal."""
    variance_K = jnp.var(means_BxK, axis=0, ddof=1)
    return jnp.where(variance_K > 0, jnp.sqrt(jnp.where(variance_K > 0, variance_K, 1.0)), 0.0)


def kaplan_yorke_dimension(exponents: Float[Array, " k"]) -> Float[Array, ""]:
    """The Kaplan-Yorke (Lyapunov) dimension of the attractor that has these exponents.

    With the exponents in descending order and j the greatest number of them whose sum is not negative:
    j + (sum of those j) / |exponent j+1| (Kaplan and Yorke 1979; Eckmann and Ruelle 1985). If all are
    given, or enough for the sum to be negative, it is exact; else it is their number, a lower bound.

    Args:
        exponents: (K,) in any order; minus infinity is allowed.

    Example:
        >>> kaplan_yorke_dimension(jnp.array([0.5, 0.0, -2.0]))
        Array(2.25, dtype=float32)
    """
    K = exponents.shape[0]
    descending_K = -jnp.sort(-exponents)
    sums_K = jnp.cumsum(descending_K)
    j = jnp.sum(jnp.cumprod((sums_K >= 0).astype(jnp.int32)))
    sum_j = jnp.where(j > 0, sums_K[jnp.maximum(j - 1, 0)], 0.0)
    next_one = jnp.where(j < K, descending_K[jnp.minimum(j, K - 1)], -jnp.inf)
    return j + sum_j / jnp.abs(next_one)
