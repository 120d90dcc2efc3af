"""The communication dynamics against closed forms. Sizes differ on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.dynamics import (
    MEMBER,
    Communication,
    coupling,
    drive,
    init_params,
    signals,
    step,
    unroll,
)
from ngc_jax.groups.kernels import Kernel, encode, read, weights

G, N, R, T = 3, 8, 2, 5
KERNELS = [Kernel(), Kernel("riemannian", metric_rank=1), Kernel("lifted", lift=7)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def setting(kernel):
    """Parameters away from special values, activations and potentials (by NumPy: nothing to compile)."""
    shapes = jax.eval_shape(lambda key: init_params(key, G, N, R, kernel=kernel), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.6 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    h, u = rng.standard_normal((G, N)), 0.3 * rng.standard_normal((T, G, N))
    return params, jnp.asarray(h, jnp.float32), jnp.asarray(u, jnp.float32)


def group(params, g):
    return jax.tree.map(lambda leaf: leaf[g], params["states"])


def numpy_coupling(kernel, params):
    """Block (g, g') = phi_out_g T_gg' M phi_in_g'^T, by the kernel's formed parts, in float64 loops."""
    transport = np.asarray(params["transport"], np.float64)
    read_out = jax.jit(lambda states: read(kernel, states, MEMBER, jnp.eye(transport.shape[-1])))
    encode_in = jax.jit(lambda states: encode(kernel, states, jnp.eye(N)))
    states = [group(jax.tree.map(np.asarray, params), g) for g in range(G)]
    phi_out = [np.asarray(read_out(one), np.float64).T for one in states]
    m_phi_in = [np.asarray(encode_in(one), np.float64).T for one in states]
    return np.block([[phi_out[g] @ transport[g, h] @ m_phi_in[h] for h in range(G)] for g in range(G)])


@every_kernel
def test_the_mapped_step_equals_a_loop_over_groups(kernel):
    params, h, u = setting(kernel)

    @jax.jit
    def mapped(params, h, u):
        return signals(params, h, kernel), step(params, h, u, dt=0.2, kernel=kernel)

    @jax.jit
    def looped(params, h, u):
        sent, after = [encode(kernel, group(params, g), h[g]) for g in range(G)], []
        for g in range(G):
            received = sum(params["transport"][g, sender] @ sent[sender] for sender in range(G))
            after.append(h[g] + 0.2 * (-h[g] + jnp.tanh(read(kernel, group(params, g), MEMBER, received)) + u[g]))
        return jnp.stack(sent), jnp.stack(after)

    for one, other in zip(mapped(params, h, u[0]), looped(params, h, u[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@every_kernel
def test_the_coupling_is_the_formed_drive(kernel):
    params, h, _ = setting(kernel)
    W = coupling(params, kernel)
    np.testing.assert_allclose(W, numpy_coupling(kernel, params), atol=1e-5)
    np.testing.assert_allclose(drive(params, h, kernel).reshape(-1), W @ h.reshape(-1), atol=1e-5)


@every_kernel
@pytest.mark.parametrize("dt", [0.25, 1.0])
def test_the_jacobian_has_its_closed_form(kernel, dt):
    params, h, u = setting(kernel)
    jacobian = jax.jit(jax.jacfwd(lambda h: step(params, h, u[0], dt=dt, kernel=kernel)))(h)
    W = numpy_coupling(kernel, params)
    slope = 1 / np.cosh(W @ np.asarray(h, np.float64).reshape(-1)) ** 2
    expected = (1 - dt) * np.eye(G * N) + dt * slope[:, None] * W
    np.testing.assert_allclose(jacobian.reshape(G * N, G * N), expected, atol=1e-5)


def test_intra_group_communication_alone_is_each_group_s_own_weight():
    params, _, _ = setting(KERNELS[0])
    params["transport"] = jnp.einsum("gh,st->ghst", jnp.eye(G), jnp.eye(R))
    W = coupling(params).reshape(G, N, G, N)
    for g in range(G):
        np.testing.assert_allclose(W[g, :, g], weights(Kernel(), group(params, g), MEMBER), atol=1e-6)
        assert not np.any(np.delete(np.asarray(W[g]), g, axis=1))


def test_without_coupling_activations_decay_exactly():
    params, h, u = setting(KERNELS[0])
    params["transport"] = jnp.zeros_like(params["transport"])
    trajectory = unroll(params, h, jnp.zeros_like(u), dt=0.1)
    rounds = np.arange(1, T + 1)[:, None, None]
    np.testing.assert_allclose(trajectory, 0.9**rounds * np.asarray(h), rtol=1e-5)
    # A constant potential is approached by the same law, and is the fixed point.
    driven = unroll(params, h, jnp.broadcast_to(u[0], u.shape), dt=0.1)
    np.testing.assert_allclose(driven - u[0], 0.9**rounds * np.asarray(h - u[0]), rtol=1e-4, atol=1e-6)


def test_linear_dynamics_are_powers_of_one_matrix():
    params, h, u = setting(KERNELS[0])
    trajectory = unroll(params, h, jnp.zeros_like(u), dt=0.3, activation=lambda drive: drive)
    one_round = 0.7 * np.eye(G * N) + 0.3 * numpy_coupling(KERNELS[0], params)
    state = np.asarray(h, np.float64).reshape(-1)
    for h_GxN in trajectory:
        state = one_round @ state
        np.testing.assert_allclose(h_GxN.reshape(-1), state, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("dt", [0.3, 1.0])
def test_weak_coupling_contracts_at_the_promised_rate(kernel, dt):
    params, h, u = setting(kernel)
    norm = np.linalg.norm(numpy_coupling(kernel, params), 2)
    params["transport"] *= 0.6 / norm
    run = jax.jit(lambda h, u: unroll(params, h, u, dt=dt, kernel=kernel))
    apart = np.asarray(run(h, u) - run(-2.0 * h, u))
    distances = np.array([3 * np.linalg.norm(h), *np.linalg.norm(apart.reshape(T, -1), axis=1)])
    assert (distances[1:] <= (1 - dt * 0.4) * distances[:-1] * (1 + 1e-5)).all()
    # A fixed point of the driven dynamics satisfies h = sigma(W h) + u.
    fixed = run(h, jnp.broadcast_to(u[0], (200, G, N)))[-1]
    W = numpy_coupling(kernel, params)
    np.testing.assert_allclose(
        fixed.reshape(-1), np.tanh(W @ np.asarray(fixed).reshape(-1)) + u[0].reshape(-1), atol=1e-5
    )


def test_unroll_is_repeated_stepping():
    params, h, u = setting(KERNELS[0])
    trajectory = jax.jit(lambda p, h, u: unroll(p, h, u, dt=0.2))(params, h, u)
    assert trajectory.shape == (T, G, N)
    for u_GxN, h_after in zip(u, trajectory, strict=True):
        h = step(params, h, u_GxN, dt=0.2)
        np.testing.assert_allclose(h_after, h, atol=1e-6)


def test_the_potential_is_what_the_undriven_step_leaves_unexplained():
    params, h, u = setting(KERNELS[0])
    moved = step(params, h, u[0], dt=0.2) - step(params, h, jnp.zeros_like(h), dt=0.2)
    np.testing.assert_allclose(moved / 0.2, u[0], atol=1e-5)


def test_batches_are_one_more_vmap():
    params, h, u = setting(KERNELS[0])
    hs = jnp.stack([h, 2 * h, -h, jnp.ones_like(h)])
    run = jax.jit(lambda h: unroll(params, h, u, dt=0.2))
    together = jax.jit(jax.vmap(run))(hs)
    for h_one, trajectory in zip(hs, together, strict=True):
        np.testing.assert_allclose(trajectory, run(h_one), atol=1e-6)


@every_kernel
def test_gradients_through_the_scan_equal_finite_differences(kernel):
    rng = np.random.default_rng(0)
    point = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), setting(kernel))
    directions = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), point)
    with jax.enable_x64(True):

        @jax.jit
        def loss(t):
            params, h, u = jax.tree.map(lambda p, d: p + t * d, point, directions)
            return jnp.sum(unroll(params, h, u, dt=0.2, kernel=kernel)[-1] ** 2)

        slope, epsilon = jax.grad(loss)(0.0), 1e-6
        assert slope.dtype == jnp.float64
        np.testing.assert_allclose(slope, (loss(epsilon) - loss(-epsilon)) / (2 * epsilon), rtol=1e-6)


@every_kernel
def test_the_drive_has_the_strength_asked_for(kernel):
    params = init_params(jax.random.key(0), 4, 300, 6, kernel=kernel, strength=0.5)
    # For independent activations of variance 1: the root mean square of W's rows. There are few latent
    # dimensions, so the scale of one draw wanders by a fifth.
    rms = jnp.sqrt(jnp.sum(coupling(params, kernel) ** 2) / (4 * 300))
    assert float(rms) == pytest.approx(0.5, rel=0.25)
    silent = init_params(jax.random.key(0), 4, 300, 6, kernel=kernel, strength=0.0)
    assert not np.any(silent["transport"])


def test_the_module_owns_exactly_the_parameters():
    _, h, u = setting(KERNELS[0])
    module = Communication(G, N, R, dt=0.2)
    variables = module.init(jax.random.key(0), h, u[0])
    fresh = init_params(jax.random.key(0), G, N, R)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, fresh)
    params = variables["params"]
    np.testing.assert_allclose(module.apply(variables, h, u[0]), step(params, h, u[0], dt=0.2), atol=1e-6)
    np.testing.assert_allclose(module.apply(variables, h, u, method="unroll"), unroll(params, h, u, dt=0.2), atol=1e-6)


def test_no_groups_are_refused():
    with pytest.raises(UsageError, match="expected at least 1 group"):
        init_params(jax.random.key(0), 0, N, R)
