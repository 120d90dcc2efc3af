"""Contraction rates and metrics against NumPy, definitions and what trajectories do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.stability import (
    contraction_rate,
    contraction_rates,
    distances,
    fit_metric,
    jacobians_along,
    lyapunov_metric,
    matrix_measure,
    spectral_radius,
    systems,
)

RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((4, 4))
METRIC = ROOT @ ROOT.T + np.eye(4)
# Stable, and yet it stretches some vectors more than sevenfold.
SKEWED = np.array([[0.8, 7.0, 0.0], [0.0, 0.6, 1.0], [0.0, -0.2, 0.5]])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def longest(matrix, metric):
    """The greatest factor by which a map stretches the length sqrt(d^T P d), from the generalised eigenproblem."""
    return np.sqrt(np.linalg.eigvals(np.linalg.solve(metric, matrix.T @ metric @ matrix)).real.max())


def test_rates_are_those_of_the_generalised_eigenproblem(x64):
    J = RNG.standard_normal((4, 4))
    assert float(contraction_rate(J, METRIC, dt=0.5)) == pytest.approx(np.log(longest(J, METRIC)) / 0.5)
    assert float(contraction_rate(J)) == pytest.approx(np.log(np.linalg.norm(J, 2)))
    # The measure is the rate of a short step: (||I + h A|| - 1) / h as h vanishes.
    for metric in (METRIC, np.eye(4)):
        slope = (longest(np.eye(4) + 1e-7 * J, metric) - 1) / 1e-7
        assert float(matrix_measure(jnp.asarray(J), jnp.asarray(metric))) == pytest.approx(slope, rel=1e-5)
    assert float(contraction_rate(jnp.zeros((2, 2)))) == -np.inf


def test_trajectories_approach_at_least_at_the_rate(x64):
    weights = jnp.asarray(RNG.standard_normal((4, 4)))
    step = jax.jit(lambda x, u: jnp.tanh(0.9 * weights @ x / jnp.linalg.norm(weights, 2) + u))
    inputs = jnp.asarray(RNG.standard_normal((8, 4)))
    runs = []
    for start in (jnp.ones(4), jnp.ones(4) + 1e-6):
        states = [start]
        for u in inputs:
            states.append(step(states[-1], u))
        runs.append(jnp.stack(states))
    rates = contraction_rates(step, runs[0][:-1], inputs=inputs)
    apart = np.log(distances(*runs))
    assert rates.shape == (8,)
    assert (np.asarray(rates) < 0).all()
    assert (np.diff(apart) <= np.asarray(rates) + 1e-5).all()


def test_a_stable_map_contracts_in_its_lyapunov_metric(x64):
    radius = np.abs(np.linalg.eigvals(SKEWED)).max()
    assert float(contraction_rate(SKEWED)) > 1.9
    for rate in (None, np.log(radius) * 0.9, -0.01):
        metric = lyapunov_metric(SKEWED, rate)
        bound = np.log(radius) / 2 if rate is None else rate
        assert np.log(radius) <= float(contraction_rate(SKEWED, metric)) < bound
        assert float(jnp.trace(metric)) == pytest.approx(3)
    # A map that grows has a metric in which it grows hardly faster than its eigenvalue.
    assert float(contraction_rate(2 * SKEWED, lyapunov_metric(2 * SKEWED, 0.6))) < 0.6
    assert float(contraction_rate(np.eye(3, k=1), lyapunov_metric(np.eye(3, k=1)))) < -1
    for unstable, rate in ((2 * SKEWED, None), (SKEWED, np.log(radius) - 0.01)):
        with pytest.raises(UsageError, match="expected a rate above that"):
            lyapunov_metric(unstable, rate)


def test_a_learned_metric_finds_the_spectral_radius_of_one_map(x64):
    fit = jax.jit(fit_metric)(jnp.asarray(SKEWED)[None])
    exact = float(jnp.log(spectral_radius(jnp.asarray(SKEWED))))
    assert exact <= float(fit.rate) + 1e-9
    assert float(fit.rate) == pytest.approx(exact, rel=0.02, abs=0.01)
    assert float(fit.history[0]) == pytest.approx(np.log(np.linalg.norm(SKEWED, 2)))
    assert float(contraction_rate(SKEWED, fit.metric)) == pytest.approx(float(fit.rate), abs=1e-6)


def test_a_learned_metric_helps_the_worst_step_of_a_trajectory():
    step = partial(systems.tanh_network, jnp.asarray(SKEWED, jnp.float32))
    states = [jnp.array([1.0, -0.5, 0.3])]
    for _ in range(11):
        states.append(step(states[-1]))
    states = jnp.stack(states)
    fit = jax.jit(lambda stack: fit_metric(stack, iterations=300, dt=0.5))(jacobians_along(step, states))
    before = contraction_rates(step, states, dt=0.5)
    after = contraction_rates(step, states, fit.metric, dt=0.5)
    assert float(before.max()) > 1
    assert float(after.max()) < 0
    assert float(after.max()) == pytest.approx(float(fit.rate), abs=1e-3)


def test_a_fit_never_ends_worse_than_it_began(x64):
    stack = jnp.asarray(RNG.standard_normal((5, 4, 4)))
    start = max(float(contraction_rate(one, METRIC)) for one in stack)
    fit = jax.jit(lambda stack: fit_metric(stack, start=METRIC, iterations=3, learning_rate=5.0))(stack)
    assert float(fit.rate) <= start + 1e-9
    assert float(fit.history[0]) == pytest.approx(start)


def test_rates_have_gradients(x64):
    J, direction = jnp.asarray(RNG.standard_normal((4, 4))), jnp.asarray(RNG.standard_normal((4, 4)))

    def rate(t):
        return contraction_rate(J + t * direction, METRIC) + matrix_measure(J + t * direction, METRIC)

    np.testing.assert_allclose(jax.grad(rate)(0.0), (rate(1e-6) - rate(-1e-6)) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (np.eye(3), r"a metric of shape \(3, 3\) for 4 numbers"),
        (np.diag([1.0, 1.0, 1.0, -1.0]), "least eigenvalue -1"),
        (np.eye(4) + 0.3 * np.eye(4, k=1), "expected a symmetric, positive matrix"),
    ],
)
def test_what_is_no_metric_is_refused(metric, message):
    with pytest.raises(UsageError, match=message):
        contraction_rate(np.eye(4), metric)


def test_jacobians_that_are_no_stack_are_refused():
    with pytest.raises(UsageError, match="expected a stack"):
        fit_metric(jnp.ones((3, 2)))
