"""The potential: recovered where it is known, and its size and direction against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups import dynamics
from ngc_jax.stability import lyapunov_spectrum, potential_against, potential_along, random_frame, share_in_span

G, N, R, T = 3, 5, 2, 7


def setting():
    params = dynamics.init_params(jax.random.key(0), G, N, R, strength=2.0)
    h = jax.random.normal(jax.random.key(1), (G, N))
    u = 0.3 * jax.random.normal(jax.random.key(2), (T, G, N))
    return params, h, u


def actual(params, h, u, dt):
    return jax.jit(lambda h, u: jnp.concatenate([h[None], dynamics.unroll(params, h, u, dt=dt)]))(h, u)


def undriven(params, dt):
    return jax.jit(lambda h: dynamics.step(params, h, jnp.zeros_like(h), dt=dt))


@pytest.mark.parametrize("dt", [0.2, 1.0])
def test_communicating_groups_give_back_the_potential_they_were_given(dt):
    params, h, u = setting()
    drive = jax.jit(lambda h: potential_along(actual(params, h, u, dt), undriven(params, dt), dt=dt))(h)
    np.testing.assert_allclose(drive.potential, u, atol=1e-5)
    magnitude = np.linalg.norm(np.asarray(u).reshape(T, -1), axis=1)
    np.testing.assert_allclose(drive.magnitude, magnitude, rtol=1e-4)
    states = actual(params, h, u, dt)
    np.testing.assert_allclose(drive.undriven + drive.potential, (states[1:] - states[:-1]) / dt, atol=1e-5)
    np.testing.assert_allclose(
        drive.share,
        magnitude / (magnitude + np.linalg.norm(np.asarray(drive.undriven).reshape(T, -1), axis=1)),
        rtol=1e-4,
    )


def test_undriven_groups_have_no_potential():
    params, h, u = setting()
    drive = potential_along(actual(params, h, 0 * u, 0.2), undriven(params, 0.2), dt=0.2)
    np.testing.assert_allclose(drive.magnitude, 0.0, atol=1e-5)
    assert (np.asarray(drive.share) < 1e-4).all()


def test_size_and_direction_of_simple_motions():
    # The undriven step moves every state by (1, 0); what happens is a push along, against, across, and to a stop.
    moves = jnp.array([[3.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    trajectory = jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(moves, axis=0)])
    drive = potential_along(trajectory, lambda x: x + jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(drive.potential, [[2, 0], [-2, 0], [0, 1], [0, 0]])
    np.testing.assert_allclose(drive.share, [2 / 3, 2 / 3, 1 / 2, 0])
    np.testing.assert_allclose(drive.cosine, [1, -1, 0, 0], atol=1e-6)
    still = potential_along(jnp.zeros((3, 2)), lambda x: x)
    np.testing.assert_array_equal(still.share, 0.0)
    alone = potential_along(trajectory, lambda x: x)
    np.testing.assert_allclose(alone.share, 1.0)


def test_inputs_that_belong_to_the_dynamics_are_no_potential():
    inputs = jnp.arange(6.0).reshape(3, 2)
    trajectory = {"x": jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(inputs + 0.5, axis=0)])}
    drive = potential_along(trajectory, lambda s, u: {"x": s["x"] + u}, inputs=inputs)
    np.testing.assert_allclose(drive.potential["x"], 0.5, rtol=1e-6)


def test_a_recorded_reference():
    params, h, u = setting()
    one, other = actual(params, h, u, 0.2), actual(params, h, 0 * u, 0.2)
    drive = potential_against(one, other, dt=0.2)
    # Both start at h: the first step has the whole potential and nothing else.
    np.testing.assert_allclose(drive.potential[0], u[0], atol=1e-5)
    np.testing.assert_allclose(drive.potential, (np.diff(one, axis=0) - np.diff(other, axis=0)) / 0.2, atol=1e-5)
    assert float(jnp.abs(drive.potential[-1] - u[-1]).max()) > 1e-3


def test_shares_in_spans():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((T, 6, 4)))[0]
    coefficients = np.random.default_rng(1).standard_normal((T, 3))
    inside = {
        "a": np.einsum("tnk,tk->tn", q[:, :2, :3], coefficients),
        "b": np.einsum("tnk,tk->tn", q[:, 2:, :3], coefficients),
    }
    share = share_in_span(jax.tree.map(jnp.asarray, inside), jnp.asarray(q))
    expected = np.cumsum(coefficients**2, axis=1) / np.sum(coefficients**2, axis=1, keepdims=True)
    np.testing.assert_allclose(share[:, :3], expected, rtol=1e-4)
    np.testing.assert_allclose(share[:, 2:], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(share_in_span(jnp.zeros((T, 6)), jnp.asarray(q)), 0.0)


def test_a_push_along_the_expanding_direction_is_found_there():
    # x grows, y shrinks; the frame of the spectrum turns to x, and so do pushes along x only.
    step = lambda h, u: jnp.array([1.5, 0.5, 0.3]) * h + u  # noqa: E731
    u = jnp.zeros((20, 3)).at[:10, 0].set(1.0).at[10:, 1].set(1.0)
    frame = random_frame(jax.random.key(0), jnp.zeros(3), 2)
    run = jax.jit(lambda u: lyapunov_spectrum(step, jnp.zeros(3), frame, inputs=u, keep_frames=True))(u)
    share = share_in_span(u, run.frames)
    assert (np.asarray(share[5:10, 0]) > 0.99).all()
    assert (np.asarray(share[10:, 0]) < 0.01).all()
    assert (np.asarray(share[12:, 1]) > 0.99).all()


def test_potentials_of_a_batch_and_their_gradient():
    params, h, u = setting()

    def magnitude(h):
        return potential_along(actual(params, h, u, 0.2), undriven(params, 0.1), dt=0.2).magnitude

    hs = jnp.stack([h, 2 * h, -h])
    together = jax.jit(jax.vmap(magnitude))(hs)
    np.testing.assert_allclose(together, jnp.stack([jax.jit(magnitude)(h) for h in hs]), rtol=1e-4)
    assert np.isfinite(jax.jit(jax.grad(lambda h: magnitude(h).sum()))(h)).all()
    # At rest there is no direction to differentiate the length in; the derivative is 0, not NaN.
    still = jax.grad(lambda x: potential_along(jnp.zeros((3, 2)) + x, lambda x: x).share.sum())(1.0)
    assert np.isfinite(still)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="a trajectory of 1 states; expected at least two"):
        potential_along(jnp.zeros((1, 2)), jnp.tanh)
    with pytest.raises(UsageError, match="entries"):
        potential_along({"a": jnp.zeros((3, 2)), "b": jnp.zeros((4, 2))}, jnp.tanh)
    with pytest.raises(UsageError, match="expected the same shapes"):
        potential_along(jnp.zeros((3, 2)), lambda x: x[:1])
    with pytest.raises(UsageError, match="expected the same shapes"):
        potential_against(jnp.zeros((3, 2)), jnp.zeros((4, 2)))
    with pytest.raises(UsageError, match="inputs for 3 steps"):
        potential_along(jnp.zeros((3, 2)), lambda x, u: x, inputs=jnp.zeros((3, 1)))
    with pytest.raises(UsageError, match="and one more for the directions"):
        share_in_span(jnp.zeros((3, 2)), jnp.zeros((3, 4, 1)))
