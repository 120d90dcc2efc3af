"""Lyapunov exponents against known answers, the road over full Jacobians, and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ngc_jax.errors import UsageError
from ngc_jax.stability import (
    LyapunovSpectrum,
    jacobians_along,
    kaplan_yorke_dimension,
    lyapunov_of_maps,
    lyapunov_spectrum,
    orthonormalise,
    random_frame,
    spectral_radius,
    standard_error,
    systems,
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def measure(step, state, k, **settings):
    frame = random_frame(jax.random.key(1), state, k)
    return jax.jit(lambda state, frame: lyapunov_spectrum(step, state, frame, **settings))(state, frame)


def with_eigenvalues(eigenvalues, seed=0):
    """A matrix that is not normal, with these eigenvalues."""
    vectors = np.eye(len(eigenvalues)) + 0.4 * np.random.default_rng(seed).standard_normal([len(eigenvalues)] * 2)
    return vectors @ np.diag(eigenvalues) @ np.linalg.inv(vectors)


# A pytree state that is driven, with parameters: what the general road has to cope with.
def driven_step(weights, state, u):
    return {"h": jnp.tanh(weights @ state["h"] + u) + state["c"][0, 0], "c": 0.7 * state["c"] + 0.1 * state["h"][0]}


def driven_setting(dtype=np.float64):
    rng = np.random.default_rng(3)
    state = {"h": rng.standard_normal(4), "c": rng.standard_normal((1, 2))}
    arrays = rng.standard_normal((4, 4)), state, 0.3 * rng.standard_normal((12, 4))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), arrays)


def test_a_linear_map_has_the_logarithms_of_its_eigenvalues():
    eigenvalues = np.array([1.3, -0.9, 0.6, 0.35, -0.2])
    step = partial(systems.linear, jnp.asarray(with_eigenvalues(eigenvalues), jnp.float32))
    # Small at the start: 1.3^400 is larger than float32 knows, and the state does not matter here.
    run = measure(step, jnp.zeros(5), 4, steps=200, transient=100)
    np.testing.assert_allclose(run.exponents, np.log(np.abs(eigenvalues[:4])), rtol=1e-3)
    assert run.local.shape == run.running.shape == (200, 4)
    assert run.frame.shape == (5, 4)


def test_a_rotation_neither_grows_nor_shrinks():
    run = measure(partial(systems.rotation, angle=0.7), jnp.array([1.0, 2.0]), 2, steps=100)
    np.testing.assert_allclose(run.exponents, 0.0, atol=1e-6)


def test_henon(x64):
    run = measure(systems.henon, jnp.array([0.1, 0.1]), 2, steps=100_000, transient=1000)
    assert float(run.exponents[0]) == pytest.approx(0.4192, rel=0.02)
    # The area shrinks by the factor 0.3 in every step.
    np.testing.assert_allclose(run.local.sum(axis=1), np.log(0.3), atol=1e-9)
    assert abs(run.exponents[0] - 0.4192) < 3 * run.standard_errors[0]
    np.testing.assert_allclose(run.running[-1], run.exponents, rtol=1e-12)
    assert float(kaplan_yorke_dimension(run.exponents)) == pytest.approx(1.258, rel=0.01)


def test_logistic(x64):
    run = measure(systems.logistic, jnp.array([0.3]), 1, steps=50_000, transient=100)
    assert float(run.exponents[0]) == pytest.approx(np.log(2), rel=0.02)


def test_lorenz(x64):
    step = partial(systems.rk4, systems.lorenz, dt=0.01)
    run = measure(step, jnp.array([1.0, 1.0, 20.0]), 3, steps=50_000, transient=1000, every=10).per_time(0.01)
    np.testing.assert_allclose(run.exponents, [0.9056, 0.0, -14.5723], rtol=0.02, atol=0.01)
    np.testing.assert_array_less(np.abs(run.exponents - np.array([0.9056, 0.0, -14.5723])), 3 * run.standard_errors)
    assert float(run.exponents.sum()) == pytest.approx(-(10 + 1 + 8 / 3), rel=1e-3)
    assert float(kaplan_yorke_dimension(run.exponents)) == pytest.approx(2.062, rel=0.005)


def test_gradient_descent_decays_at_the_curvature():
    curvature = np.array([0.5, 2.0, 4.0])
    step = partial(systems.gradient_step, lambda x: jnp.sum(jnp.asarray(curvature, jnp.float32) * x**2) / 2, rate=0.01)
    run = measure(step, jnp.array([1.0, -2.0, 0.5]), 3, steps=1000, transient=1500, every=10).per_time(0.01)
    np.testing.assert_allclose(run.exponents, np.log(1 - 0.01 * curvature) / 0.01, rtol=1e-3)
    np.testing.assert_allclose(run.exponents, -curvature, rtol=0.025)


@pytest.mark.parametrize("gain", [0.8, 3.0])
def test_random_networks(gain):
    weights = systems.random_weights(jax.random.key(3), 300, gain)
    start = jax.random.normal(jax.random.key(4), (300,))
    run = measure(partial(systems.tanh_network, weights), start, 1, steps=1000, transient=200)
    if gain < 1:
        # Dead activity, and the exponent of this network's own matrix rather than of an infinite one.
        assert float(jnp.abs(run.state).max()) < 1e-6
        assert float(run.exponents[0]) == pytest.approx(float(jnp.log(spectral_radius(weights))), rel=0.02)
    else:
        assert float(run.exponents[0]) == pytest.approx(systems.mean_field_exponent(gain), rel=0.02)


@pytest.mark.parametrize("every", [1, 3])
def test_the_road_over_full_jacobians_is_the_same(x64, every):
    weights, state, inputs = driven_setting()
    step = partial(driven_step, weights)
    frame = random_frame(jax.random.key(1), state, 3)
    run = jax.jit(
        lambda state, frame: lyapunov_spectrum(
            step, state, frame, inputs=inputs, transient=3, every=every, keep_frames=True
        ).per_time(0.5)
    )(state, frame)

    states = [state]
    for u in inputs:
        states.append(step(states[-1], u))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[:-1])
    growth, vectors = [], np.asarray(frame)
    for index, jacobian in enumerate(np.asarray(jacobians_along(step, stacked, inputs=inputs)), start=1):
        vectors = jacobian @ vectors
        if index % every == 0:
            vectors, r = np.linalg.qr(vectors)
            growth.append(np.log(np.abs(np.diag(r))) / (every * 0.5))
    np.testing.assert_allclose(run.local, growth[3 // every :], rtol=1e-9)
    np.testing.assert_allclose(np.abs(run.frame), np.abs(vectors), rtol=1e-7, atol=1e-12)
    assert run.frames.shape == ((12 - 3) // every, 6, 3)
    np.testing.assert_array_equal(run.frames[-1], run.frame)
    assert jax.tree.structure(run.state) == jax.tree.structure(state)
    np.testing.assert_allclose(run.state["c"], states[-1]["c"])


def test_two_short_runs_are_one_long_run(x64):
    start = jnp.array([0.1, 0.2])
    whole = measure(systems.henon, start, 2, steps=40)
    run = jax.jit(lambda x, frame: lyapunov_spectrum(systems.henon, x, frame, steps=20))
    first = run(start, random_frame(jax.random.key(1), start, 2))
    second = run(first.state, first.frame)
    both = LyapunovSpectrum.of(jnp.concatenate([first.local, second.local]), second.state, second.frame)
    np.testing.assert_allclose(both.local, whole.local, rtol=1e-6)
    np.testing.assert_allclose(both.exponents, whole.exponents, rtol=1e-9)
    np.testing.assert_allclose(both.running, whole.running, rtol=1e-6)


def test_maps_between_unlike_spaces():
    rng = np.random.default_rng(0)
    matrices = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(7, 5), (3, 7), (6, 3)]]
    maps = [
        lambda state: {"a": matrices[0] @ state},
        lambda state: (matrices[1] @ state["a"], jnp.zeros(2)),
        lambda state: matrices[2] @ state[0],
    ]
    state, frame = jnp.ones(5), random_frame(jax.random.key(0), jnp.ones(5), 2)
    run = jax.jit(lambda state, frame: lyapunov_of_maps(maps, state, frame, keep_frames=True).per_time(0.5))(
        state, frame
    )
    vectors, growth = np.asarray(frame, np.float64), []
    for matrix in matrices:
        vectors, r = np.linalg.qr(np.asarray(matrix, np.float64) @ vectors)
        growth.append(np.log(np.abs(np.diag(r))) / 0.5)
    np.testing.assert_allclose(run.local, growth, rtol=1e-4)
    assert [one.shape for one in run.frames] == [(7, 2), (5, 2), (6, 2)]
    np.testing.assert_allclose(run.state, matrices[2] @ (matrices[1] @ (matrices[0] @ state)), rtol=1e-4)
    with pytest.raises(UsageError, match="map 1 leads into a space of 1 numbers; expected at least the 2"):
        lyapunov_of_maps([maps[0], lambda state: state["a"][:1]], state, frame)
    with pytest.raises(UsageError, match="expected at least one"):
        lyapunov_of_maps([], state, frame)


def test_one_map_again_and_again_is_the_scan(x64):
    start, frame = jnp.array([0.1, 0.2]), random_frame(jax.random.key(0), jnp.ones(2), 2)
    np.testing.assert_allclose(
        jax.jit(lambda x: lyapunov_of_maps([systems.henon] * 7, x, frame).local)(start),
        jax.jit(lambda x: lyapunov_spectrum(systems.henon, x, frame, steps=7).local)(start),
        rtol=1e-9,
    )


def test_directions_that_are_lost_count_as_minus_infinity():
    rng = np.random.default_rng(0)
    a, b, c, d = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in (9, 6, 9, 6))
    rank_two = jnp.outer(a[:6], b) + jnp.outer(c[:6], d)
    run = measure(partial(systems.linear, rank_two / spectral_radius(rank_two)), jnp.ones(6), 4, steps=40, transient=8)
    assert np.isfinite(run.exponents[:2]).all()
    assert (np.asarray(run.exponents[2:]) == -np.inf).all()
    assert not np.isnan(np.concatenate([run.local.ravel(), run.running.ravel(), run.frame.ravel()])).any()
    np.testing.assert_allclose(run.frame.T @ run.frame, np.eye(4), atol=1e-5)
    assert (np.asarray(run.standard_errors[2:]) == np.inf).all()
    nothing = measure(lambda x: 0.0 * x, jnp.ones(6), 3, steps=5)
    assert (np.asarray(nothing.exponents) == -np.inf).all()
    assert not np.isnan(nothing.frame).any()


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_equal_finite_differences(x64, every):
    weights, state, inputs = driven_setting()
    frame = random_frame(jax.random.key(1), state, 3)
    direction = np.random.default_rng(5).standard_normal(weights.shape)

    @jax.jit
    def regulariser(t):
        step = partial(driven_step, weights + t * direction)
        run = lyapunov_spectrum(step, state, frame, inputs=inputs, transient=3, every=every)
        return jnp.sum(jax.nn.relu(run.exponents + 1) ** 2)

    slope = (regulariser(1e-6) - regulariser(-1e-6)) / 2e-6
    assert abs(slope) > 0.1
    np.testing.assert_allclose(jax.jit(jax.grad(regulariser))(0.0), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(regulariser))(0.0), slope, rtol=1e-6)


def test_batches_are_one_more_vmap_and_nothing_is_traced_twice():
    traced = []

    def step(x):
        traced.append(1)
        return systems.henon(x)

    frame = random_frame(jax.random.key(0), jnp.zeros(2), 2)
    one = jax.jit(lambda x: lyapunov_spectrum(step, x, frame, steps=10, every=2).exponents)
    many = jax.jit(jax.vmap(lambda x: lyapunov_spectrum(step, x, frame, steps=10, every=2).exponents))
    starts = 0.1 * jax.random.normal(jax.random.key(2), (5, 2))
    np.testing.assert_allclose(many(starts), jnp.stack([one(x) for x in starts]), atol=1e-5)
    before = len(traced)
    many(starts + 0.1), one(starts[0] + 0.1)
    assert len(traced) == before > 0


@pytest.mark.parametrize("frame_per_state", [False, True])
def test_under_shard_map(frame_per_state):
    # Two devices only: more small ones than cores may wait for one another in XLA's pool of threads.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    starts = 0.1 * jax.random.normal(jax.random.key(2), (6, 2))
    frame = random_frame(jax.random.key(0), jnp.zeros(2), 2)
    per_state, spec = (0, PartitionSpec("data")) if frame_per_state else (None, PartitionSpec())
    frames = jnp.broadcast_to(frame, (6, 2, 2)) if frame_per_state else frame

    def many(starts, frames):
        def one(start, frame):
            return lyapunov_spectrum(systems.henon, start, frame, steps=10).exponents

        return jax.vmap(one, (0, per_state))(starts, frames)

    batch = PartitionSpec("data")
    spread = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=(batch, spec), out_specs=batch))
    np.testing.assert_allclose(spread(starts, frames), many(starts, frames), atol=1e-5)


def test_half_precision_states_have_float32_frames():
    state = jnp.ones(6, jnp.bfloat16)
    run = measure(lambda x: x * jnp.bfloat16(0.5), state, 2, steps=5)
    assert run.frame.dtype == run.exponents.dtype == jnp.float32
    assert run.state.dtype == jnp.bfloat16
    # A frame that is rounded to bfloat16 in every step.
    np.testing.assert_allclose(run.exponents, np.log(0.5), atol=0.01)


def test_a_frame_that_is_not_orthonormal_is_made_so():
    step = partial(systems.linear, jnp.asarray(with_eigenvalues([0.9, 0.5, 0.2]), jnp.float32))
    frame = random_frame(jax.random.key(0), jnp.ones(3), 2)
    skewed = jnp.stack([5 * frame[:, 0], frame[:, 0] + frame[:, 1]], axis=1)
    run = jax.jit(lambda frame: lyapunov_spectrum(step, jnp.ones(3), frame, steps=4).local)
    one, other = run(frame), run(skewed)
    np.testing.assert_allclose(one, other, atol=1e-5)
    q, growth = orthonormalise(skewed)
    np.testing.assert_allclose(growth, [np.log(5), 0.0], atol=1e-6)
    np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-6)


def test_the_standard_error_knows_of_correlations():
    rng = np.random.default_rng(0)
    series = np.zeros((40_000, 3))
    memory = np.array([0.0, 0.9, -0.9])
    for t in range(1, len(series)):
        series[t] = memory * series[t - 1] + rng.standard_normal(3)
    exact = 1 / (1 - memory) / len(series) ** 0.5
    # From 32 batches an error of 1 / sqrt(62) is expected.
    np.testing.assert_allclose(standard_error(jnp.asarray(series, jnp.float32)), exact, rtol=0.35)
    # Two to three entries: the textbook formula. One: unknown.
    few = np.array([[1.0, 2.0], [4.0, 2.0], [4.0, 2.0]])
    np.testing.assert_allclose(standard_error(jnp.asarray(few)), few.std(axis=0, ddof=1) / 3**0.5, rtol=1e-6)
    assert (np.asarray(standard_error(jnp.asarray(few[:1]))) == np.inf).all()


@pytest.mark.parametrize(
    ("exponents", "dimension"),
    [
        ([-1.0, -2.0], 0.0),
        ([0.0, -1.0], 1.0),
        ([0.5, -2.0, 0.0], 2.25),
        ([-np.inf, 0.4], 1.0),
        ([1.0, 0.5], 2.0),
        ([1.0, -1.0, -3.0], 2.0),
        ([1.0, -2.0, 0.5, -5.0], 2.75),
    ],
)
def test_the_kaplan_yorke_dimension(exponents, dimension):
    assert float(jax.jit(kaplan_yorke_dimension)(jnp.array(exponents))) == pytest.approx(dimension)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "neither steps nor inputs"),
        ({"steps": 0}, "at least 1 step"),
        ({"steps": 5, "every": 2}, "multiples of 2"),
        ({"transient": 3, "every": 2}, "multiples of 2"),
        ({"steps": 4, "inputs": jnp.ones((5, 2))}, "inputs for 5 steps; expected 0 transient ones and 4 more"),
        ({"inputs": (jnp.ones((5, 2)), jnp.ones(4))}, r"leaves with \[4, 5\] entries"),
        ({"frame": jnp.ones((3, 1))}, r"a frame of shape \(3, 1\) for a state of 2 numbers"),
        ({"frame": jnp.ones((2, 3))}, "k from 1 to 2: use random_frame"),
        ({"state": jnp.array([1, 2])}, "int32 at the state itself; expected floating point"),
        ({"state": {}}, "a state without numbers"),
        ({"step": lambda x: x[:1]}, r"maps a state float32\[2\] to float32\[1\]"),
        ({"step": lambda x: x.astype(jnp.bfloat16)}, "expected the same shapes and types"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    settings = {"step": systems.henon, "state": jnp.zeros(2), "frame": jnp.eye(2), "steps": 4} | change
    with pytest.raises(UsageError, match=message) as error:
        lyapunov_spectrum(settings.pop("step"), settings.pop("state"), settings.pop("frame"), **settings)
    assert "\n" not in str(error.value)


def test_more_directions_than_numbers_are_refused():
    with pytest.raises(UsageError, match="3 directions in a state of 2 numbers"):
        random_frame(jax.random.key(0), jnp.zeros(2), 3)
