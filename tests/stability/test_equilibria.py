"""Fixed points and Lyapunov functions against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.stability import decrease, fixed_point, lyapunov_metric, quadratic_form, systems


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(step, start, steps):
    return jax.lax.scan(lambda x, _: (step(x), x), start, length=steps)[1]


def test_newton_finds_stable_and_unstable_points():
    # x = r x (1 - x) at r = 4: 0 and 3/4, both unstable.
    found = fixed_point(systems.logistic, jnp.array([0.7, 0.1]))
    np.testing.assert_allclose(found.state, [0.75, 0.0], atol=1e-6)
    assert float(found.residual) < 1e-5
    assert 0 < int(found.iterations) < 10


@pytest.mark.parametrize("method", ["newton", "iterate"])
def test_fixed_points_of_pytrees_and_their_derivatives(x64, method):
    guess = {"x": jnp.array([1.0]), "y": jnp.array([[0.0, 2.0]])}

    def solve(a):
        return fixed_point(lambda s: {"x": a * jnp.cos(s["x"]), "y": s["y"] / 2 + s["x"]}, guess, method=method)

    found = jax.jit(solve)(0.5)
    x = found.state["x"][0]
    assert float(x) == pytest.approx(0.5 * np.cos(x), rel=1e-9)
    np.testing.assert_allclose(found.state["y"], np.full((1, 2), 2 * x), rtol=1e-9)
    slope = np.cos(x) / (1 + 0.5 * np.sin(x))
    assert float(jax.jit(jax.grad(lambda a: solve(a).state["x"][0]))(0.5)) == pytest.approx(slope, rel=1e-7)
    np.testing.assert_allclose(
        jax.jit(jax.jacfwd(lambda a: solve(a).state["y"]))(0.5), np.full((1, 2), 2 * slope), rtol=1e-7
    )


def test_a_search_that_fails_says_so():
    never = fixed_point(lambda x: x + 1 + x**2, jnp.array([2.0]), iterations=20)
    assert not float(never.residual) < 0.5
    away = fixed_point(lambda x: 2 * x, jnp.ones(2), method="iterate", iterations=5)
    assert int(away.iterations) == 5
    assert float(away.residual) > 10


def test_bad_searches_are_refused():
    with pytest.raises(UsageError, match="expected newton or iterate"):
        fixed_point(jnp.tanh, jnp.ones(2), method="gues")
    with pytest.raises(UsageError, match="at most 10: use method='iterate'"):
        fixed_point(jnp.tanh, jnp.ones(11), limit=10)
    with pytest.raises(UsageError, match="expected the same shapes and types"):
        fixed_point(lambda x: x[:1], jnp.ones(2))


def test_the_loss_is_a_lyapunov_function_of_its_gradient_flow():
    def loss(state):
        return jnp.sum((state["a"] ** 2 - 1) ** 2) + jnp.sum(state["b"] ** 2)

    start = {"a": jnp.array([0.3, -2.0]), "b": jnp.array(1.0)}
    trajectory = run(partial(systems.gradient_step, loss, rate=0.01), start, 50)
    result = decrease(loss, trajectory)
    assert float(result.fraction) == 1.0
    assert float(result.worst_increase) == 0.0
    assert result.values.shape == (50,)
    assert result.increments.shape == (49,)
    np.testing.assert_allclose(result.values[0], loss(start))


def test_the_right_metric_makes_a_lyapunov_function_of_a_stable_map():
    A = np.array([[0.8, 3.0], [0.0, 0.7]])
    trajectory = run(partial(systems.linear, jnp.asarray(A, jnp.float32)), jnp.array([1.0, 1.0]), 40)
    plain = decrease(quadratic_form(jnp.zeros(2)), trajectory)
    values = [np.sum((np.linalg.matrix_power(A, t) @ np.ones(2)) ** 2) for t in range(40)]
    np.testing.assert_allclose(plain.values, values, rtol=1e-3)
    assert 0 < float(plain.fraction) < 1
    assert float(plain.worst_increase) == pytest.approx(np.diff(values).max(), rel=1e-4)
    rate = -0.1
    fitted = quadratic_form(jnp.zeros(2), lyapunov_metric(A, rate))
    assert float(decrease(fitted, trajectory, rate=float(1 - np.exp(2 * rate)) - 1e-4).fraction) == 1.0
    assert float(decrease(fitted, trajectory, rate=0.6).fraction) < 1.0


def test_steps_that_have_arrived_are_not_counted():
    trajectory = jnp.array([[2.0], [1.0], [0.0], [0.0], [1.0]])
    result = decrease(quadratic_form(jnp.zeros(1)), trajectory)
    np.testing.assert_array_equal(result.counted, [True, True, False, False])
    assert float(result.fraction) == 1.0
    assert float(result.worst_increase) == 0.0
    assert float(decrease(quadratic_form(jnp.ones(1)), trajectory).fraction) == pytest.approx(2 / 3)
    assert float(decrease(quadratic_form(jnp.zeros(1)), trajectory, tolerance=10.0).fraction) == 1.0


def test_checks_that_cannot_be_made_are_refused():
    with pytest.raises(UsageError, match="expected at least 2 states"):
        decrease(quadratic_form(jnp.zeros(2)), jnp.zeros((1, 2)))
    with pytest.raises(UsageError, match=r"a rate in \[0, 1\)"):
        decrease(quadratic_form(jnp.zeros(2)), jnp.zeros((3, 2)), rate=1.0)
    with pytest.raises(UsageError, match="a metric of shape"):
        quadratic_form(jnp.zeros(2), jnp.eye(3))
