"""Pairs of trajectories against exponents from derivatives and against powers of matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.stability import (
    distances,
    lyapunov_spectrum,
    pair_exponents,
    random_frame,
    separation_curves,
    systems,
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_pairs_agree_with_derivatives(x64):
    step = partial(systems.rk4, systems.lorenz, dt=0.01)
    state, settings = jnp.array([1.0, 1.0, 20.0]), {"steps": 1500, "transient": 1000, "every": 10}
    frame = random_frame(jax.random.key(0), state, 2)
    pairs = jax.jit(lambda x, q: pair_exponents(step, x, q, **settings))(state, frame)
    exact = jax.jit(lambda x, q: lyapunov_spectrum(step, x, q, **settings))(state, frame[:, :1])
    # A time so short that chaos has not made two orbits of one by rounding: the same local growth. Both pairs have
    # turned into the one most unstable direction.
    np.testing.assert_allclose(pairs.exponents, np.full(2, exact.exponents[0]), rtol=1e-3)
    np.testing.assert_allclose(pairs.local[:, 0], exact.local[:, 0], atol=1e-3)
    assert pairs.local.shape == (150, 2)
    np.testing.assert_allclose(np.abs(pairs.frame.T @ exact.frame), 1.0, rtol=1e-4)


def test_pairs_agree_with_known_answers_in_float32():
    run = jax.jit(lambda x: pair_exponents(systems.henon, x, jnp.eye(2)[:, :1], steps=20_000, transient=100))
    assert float(run(jnp.array([0.1, 0.1])).exponents[0]) == pytest.approx(0.4192, rel=0.02)


def test_driven_pairs_of_a_pytree_that_continue(x64):
    def step(state, u):
        return {"x": jnp.tanh(1.5 * state["x"] + u + state["y"][0]), "y": 0.5 * state["y"]}

    state = {"x": jnp.array([0.3, -0.2, 0.1]), "y": jnp.array([0.2])}
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((20, 3)))
    frame = random_frame(jax.random.key(0), state, 2)
    run = jax.jit(lambda state, frame, inputs: pair_exponents(step, state, frame, inputs=inputs, distance=1e-7))
    whole, first = run(state, frame, inputs), run(state, frame, inputs[:10])
    second = run(first.state, first.frame, inputs[10:])
    np.testing.assert_allclose(jnp.concatenate([first.local, second.local]), whole.local, atol=1e-6)


def test_separations_of_a_linear_map_are_powers(x64):
    A = np.array([[1.1, 2.0], [0.0, 0.8]])
    direction = np.array([[3.0], [4.0]])
    curve = separation_curves(partial(systems.linear, jnp.asarray(A)), jnp.ones(2), direction, steps=6, distance=0.5)
    expected = [np.log(np.linalg.norm(np.linalg.matrix_power(A, t) @ direction) / 5) for t in range(1, 7)]
    np.testing.assert_allclose(curve[:, 0], expected, rtol=1e-9)


def test_separations_grow_at_the_exponent_and_then_level_off(x64):
    frame = random_frame(jax.random.key(0), jnp.zeros(2), 2)
    starts = 0.1 * jax.random.normal(jax.random.key(1), (64, 2))
    curve = partial(separation_curves, systems.henon, directions=frame, steps=200, distance=1e-12)
    curves = jax.jit(jax.vmap(lambda x: curve(x)))(starts)
    mean = np.asarray(curves).mean(axis=(0, 2))
    assert (mean[45] - mean[5]) / 40 == pytest.approx(0.4192, rel=0.1)
    # The attractor is about two wide: no distance beyond that.
    assert abs(mean[190] - mean[150]) < 1
    assert mean[190] < np.log(3 / 1e-12)


def test_neighbours_that_meet_give_minus_infinity_and_no_nan():
    run = pair_exponents(jnp.zeros_like, jnp.ones(3), jnp.eye(3)[:, :2], steps=4)
    assert (np.asarray(run.local) == -np.inf).all()
    np.testing.assert_array_equal(run.frame, jnp.eye(3)[:, :2])


def test_distances_between_recordings():
    one = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 1, 1))}
    other = {"a": jnp.full((4, 2), 2.0), "b": jnp.arange(4.0).reshape(4, 1, 1)}
    np.testing.assert_allclose(distances(one, other), np.sqrt(8 + np.arange(4.0) ** 2), rtol=1e-6)
    with pytest.raises(UsageError, match="expected the same shapes"):
        distances(one["a"], one["a"][:3])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"at a distance of 0\.0; expected a positive number"):
        pair_exponents(systems.henon, jnp.zeros(2), jnp.eye(2), steps=3, distance=0.0)
    with pytest.raises(UsageError, match="use random_frame"):
        separation_curves(systems.henon, jnp.zeros(2), jnp.eye(3), steps=3)
    with pytest.raises(UsageError, match="neither steps nor inputs"):
        separation_curves(systems.henon, jnp.zeros(2), jnp.eye(2))
