"""The reference systems themselves, against SciPy and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from ngc_jax.errors import UsageError
from ngc_jax.stability import spectral_radius, systems


def test_runge_kutta_follows_lorenz_as_scipy_does():
    with jax.enable_x64(True):
        state = start = jnp.array([1.0, 2.0, 20.0])
        for _ in range(50):
            state = systems.rk4(systems.lorenz, state, dt=0.01)

        def velocity(_, x):
            return [10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]]

        exact = solve_ivp(velocity, (0, 0.5), np.asarray(start), rtol=1e-11, atol=1e-11).y[:, -1]
        np.testing.assert_allclose(state, exact, rtol=1e-4)


def test_runge_kutta_is_of_fourth_order_on_pytrees():
    with jax.enable_x64(True):

        def error(steps):
            state = {"x": jnp.array(1.0), "v": (jnp.array(0.0),)}
            for _ in range(steps):
                state = systems.rk4(lambda s: {"x": s["v"][0], "v": (-s["x"],)}, state, dt=1 / steps)
            return abs(float(state["x"]) - np.cos(1.0))

        assert error(10) / error(20) == pytest.approx(16, rel=0.2)


def test_rotations_keep_lengths_and_add_up():
    x = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(systems.rotation(x, angle=np.pi / 2), [-4.0, 3.0], atol=1e-5)


@pytest.mark.parametrize("gain", [1.2, 2.0, 5.0])
def test_the_mean_field_is_the_fixed_point_of_its_integrals(gain):
    def mean(f):
        return quad(lambda z: f(z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), -12, 12, limit=200)[0]

    q = 1.0
    for _ in range(400):
        q = gain**2 * mean(lambda z, q=q: np.tanh(np.sqrt(q) * z) ** 2)
    expected = 0.5 * np.log(gain**2 * mean(lambda z: np.cosh(np.sqrt(q) * z) ** -4.0))
    assert expected > 0
    assert systems.mean_field_exponent(gain) == pytest.approx(expected, rel=1e-3)


def test_below_gain_one_the_mean_field_is_silent():
    assert systems.mean_field_exponent(0.5) == pytest.approx(np.log(0.5))
    with pytest.raises(UsageError, match="expected a positive number"):
        systems.mean_field_exponent(0.0)


def test_random_weights_have_the_gain_as_spectral_radius():
    weights = systems.random_weights(jax.random.key(0), 225, 1.7)
    assert float(spectral_radius(weights)) == pytest.approx(1.7, rel=0.1)
    assert float(weights.std()) == pytest.approx(1.7 / 15, rel=0.02)
