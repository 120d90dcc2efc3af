"""Jacobians, formed and not formed, against NumPy and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.stability import (
    henrici_departure,
    jacobian,
    jacobians_along,
    kreiss_lower_bound,
    numerical_abscissa,
    singular_values,
    spectral_radius,
    systems,
    top_singular_values,
)

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((4, 6))


def pytree_map(matrix, state):
    """From 6 numbers to 5, of other structure."""
    x = jnp.concatenate([state["a"].ravel(), state["b"]])
    return (jnp.tanh(matrix @ x), jnp.sum(x**2))


def pytree_state():
    return {"a": jnp.array([[0.1, 0.2], [0.3, -0.4]]), "b": jnp.array([0.5, -0.6])}


def test_the_jacobian_of_a_pytree_map_has_its_closed_form():
    matrix = jnp.asarray(MATRIX, jnp.float32)
    x = np.array([0.1, 0.2, 0.3, -0.4, 0.5, -0.6])
    expected = np.vstack([(1 / np.cosh(MATRIX @ x) ** 2)[:, None] * MATRIX, 2 * x])
    got = jax.jit(lambda state: jacobian(partial(pytree_map, matrix), state))(pytree_state())
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_jacobians_along_a_driven_trajectory():
    def step(x, u):
        return jnp.array([u[0] * x[0] * x[1], x[1] + u[1]])

    xs, us = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.array([[2.0, 0.0], [0.5, 1.0], [1.0, 1.0]])
    expected = [[[u[0] * x[1], u[0] * x[0]], [0.0, 1.0]] for x, u in zip(xs, us, strict=True)]
    np.testing.assert_allclose(jacobians_along(step, xs, inputs=us), expected)
    alone = jacobians_along(systems.henon, xs)
    np.testing.assert_allclose(alone, [[[-2.8 * x[0], 1.0], [0.3, 0.0]] for x in xs], rtol=1e-6)
    with pytest.raises(UsageError, match="entries"):
        jacobians_along(step, xs, inputs=us[:2])


def test_a_large_jacobian_is_refused_by_name_and_alternative():
    with pytest.raises(UsageError, match=r"shape \(5000, 5000\).*at most 4096 a side: use top_singular_values"):
        jacobian(jnp.tanh, jnp.zeros(5000))
    with pytest.raises(UsageError, match=r"shape \(1, 3\).*at most 2"):
        jacobian(jnp.sum, jnp.zeros(3), limit=2)
    assert jacobian(jnp.tanh, jnp.zeros(3), limit=3).shape == (3, 3)


def test_the_numbers_of_a_matrix():
    A = RNG.standard_normal((6, 6))
    np.testing.assert_allclose(singular_values(jnp.asarray(A)), np.linalg.svd(A)[1], rtol=1e-4)
    assert float(spectral_radius(jnp.asarray(A))) == pytest.approx(np.abs(np.linalg.eigvals(A)).max(), rel=1e-4)
    # The abscissa is the slope at 0 of the norm of exp(t A).
    step = 1e-6
    slope = (np.linalg.norm(np.eye(6) + step * A, 2) - 1) / step
    assert float(numerical_abscissa(jnp.asarray(A))) == pytest.approx(slope, rel=1e-3)


def test_the_departure_from_normality():
    normal = np.linalg.qr(RNG.standard_normal((5, 5)))[0] * 1.7
    assert float(henrici_departure(jnp.asarray(normal))) < 1e-3
    assert float(henrici_departure(jnp.eye(4, k=1))) == pytest.approx(1.0)
    assert float(henrici_departure(jnp.zeros((3, 3)))) == 0.0
    # [[a, c], [0, b]]: c / sqrt(a^2 + b^2 + c^2).
    assert float(henrici_departure(jnp.array([[0.5, 3.0], [0.0, 0.4]]))) == pytest.approx(3 / 9.41**0.5, rel=1e-5)


def test_the_kreiss_bound_lies_where_the_theorem_puts_it():
    for corner in (1.0, 5.0, 20.0):
        A = np.array([[0.9, corner, 0.0], [0.0, 0.7, corner], [0.0, 0.0, -0.5]])
        growth = max(np.linalg.norm(np.linalg.matrix_power(A, n), 2) for n in range(100))
        bound = float(kreiss_lower_bound(jnp.asarray(A, jnp.float32)))
        # The constant itself is at least growth / (e N); the grid finds nearly all of it.
        assert growth / (np.e * 3) * 0.95 < bound <= growth * (1 + 1e-4)
    assert float(kreiss_lower_bound(jnp.diag(jnp.array([0.9, -0.5])))) == pytest.approx(1.0, abs=1e-5)


def decaying(rows, columns, rank):
    u = np.linalg.qr(RNG.standard_normal((rows, rank)))[0]
    v = np.linalg.qr(RNG.standard_normal((columns, rank)))[0]
    return (u * 1.2 ** -np.arange(rank)) @ v.T


@pytest.mark.parametrize("shape", [(70, 90), (90, 70)])
def test_singular_values_without_the_matrix(shape):
    A = decaying(*shape, rank=60)
    step = partial(systems.linear, jnp.asarray(A, jnp.float32))
    top = jax.jit(lambda x, key: top_singular_values(step, x, 3, key))(jnp.zeros(shape[1]), jax.random.key(0))
    np.testing.assert_allclose(top.values, 1.2 ** -np.arange(3.0), rtol=1e-4)
    assert top.right.shape == (shape[1], 3)
    assert top.left.shape == (shape[0], 3)
    np.testing.assert_allclose(A @ np.asarray(top.right), np.asarray(top.left) * np.asarray(top.values), atol=1e-4)
    assert (np.asarray(top.residuals) < 1e-3).all()


def test_residuals_say_when_the_iteration_has_not_converged():
    A = RNG.standard_normal((80, 80))
    exact = np.linalg.svd(A)[1]
    step = partial(systems.linear, jnp.asarray(A, jnp.float32))
    rough = jax.jit(lambda x, key: top_singular_values(step, x, 2, key, iterations=2, oversample=0))(
        jnp.zeros(80), jax.random.key(0)
    )
    assert float(rough.residuals[0]) > 0.1
    for value, residual in zip(rough.values, rough.residuals, strict=True):
        assert np.abs(exact - float(value)).min() <= float(residual)


def test_low_rank_and_small_jacobians():
    A = decaying(40, 50, rank=3)
    step = partial(systems.linear, jnp.asarray(A, jnp.float32))
    top = jax.jit(lambda x, key: top_singular_values(step, x, 5, key, iterations=4, oversample=1))(
        jnp.zeros(50), jax.random.key(0)
    )
    np.testing.assert_allclose(top.values, [1.0, 1 / 1.2, 1 / 1.44, 0.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(top.right.T @ top.right, np.eye(5), atol=1e-5)
    # Six numbers: taken whole, and exact.
    f = partial(pytree_map, jnp.asarray(MATRIX, jnp.float32))
    whole = jax.jit(lambda state, key: top_singular_values(f, state, 5, key))(pytree_state(), jax.random.key(0))
    np.testing.assert_allclose(whole.values, np.linalg.svd(jacobian(f, pytree_state()))[1], rtol=1e-4)
    assert (np.asarray(whole.residuals) < 1e-4).all()


def test_singular_values_have_gradients():
    with jax.enable_x64(True):
        A, B = jnp.asarray(decaying(40, 40, 30)), jnp.asarray(RNG.standard_normal((40, 40)) * 0.05)
        x = jnp.asarray(RNG.standard_normal(40))

        @jax.jit
        def value(t):
            top = top_singular_values(lambda x: jnp.tanh((A + t * B) @ x), x, 2, jax.random.key(0), iterations=4)
            return jnp.sum(top.values**2)

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), slope, rtol=1e-4)


def test_singular_values_of_a_batch():
    xs = jax.random.normal(jax.random.key(0), (3, 6))
    values = jax.jit(jax.vmap(lambda x: top_singular_values(jnp.sin, x, 2, jax.random.key(0)).values))(xs)
    np.testing.assert_allclose(values, -np.sort(-np.abs(np.cos(xs)), axis=1)[:, :2], rtol=1e-4)


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 4}, {"iterations": 0}, {"oversample": -1}])
def test_numbers_out_of_range_are_refused(change):
    settings = {"k": 1} | change
    with pytest.raises(UsageError, match=r"shape \(3, 3\).*expected k from 1 to the smaller side"):
        top_singular_values(jnp.tanh, jnp.zeros(3), settings.pop("k"), jax.random.key(0), **settings)
