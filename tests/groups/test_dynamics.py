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


def setting(kernel=KERNELS[0], strength=1.0):
    params = init_params(jax.random.key(0), G, N, R, kernel=kernel, strength=strength)
    if kernel.name == "riemannian":
        params["states"]["metric"]["log_diagonal"] += jnp.linspace(-1, 1, G * R).reshape(G, R)
    h = jax.random.normal(jax.random.key(1), (G, N))
    u = 0.3 * jax.random.normal(jax.random.key(2), (T, G, N))
    return params, h, u


def group(params, g):
    return jax.tree.map(lambda leaf: leaf[g], params["states"])


def numpy_coupling(kernel, params):
    """Block (g, g') = phi_out_g T_gg' M phi_in_g'^T, by the kernel's formed parts, in float64 loops."""
    blocks = [[None] * G for _ in range(G)]
    identity = jnp.eye(N)
    for g in range(G):
        phi_out = np.asarray(
            read(kernel, group(params, g), MEMBER, jnp.eye(params["transport"].shape[-1])), np.float64
        ).T
        for sender in range(G):
            m_phi_in = np.asarray(encode(kernel, group(params, sender), identity), np.float64).T
            blocks[g][sender] = phi_out @ np.asarray(params["transport"][g, sender], np.float64) @ m_phi_in
    return np.block(blocks)


@every_kernel
def test_the_mapped_step_equals_a_loop_over_groups(kernel):
    params, h, u = setting(kernel)
    sent = [encode(kernel, group(params, g), h[g]) for g in range(G)]
    np.testing.assert_allclose(signals(params, h, kernel), jnp.stack(sent), atol=1e-6)
    after = []
    for g in range(G):
        received = sum(params["transport"][g, sender] @ sent[sender] for sender in range(G))
        after.append(h[g] + 0.2 * (-h[g] + jnp.tanh(read(kernel, group(params, g), MEMBER, received)) + u[0, g]))
    np.testing.assert_allclose(step(params, h, u[0], dt=0.2, kernel=kernel), jnp.stack(after), atol=1e-6)


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
    params, _, _ = setting()
    params["transport"] = jnp.einsum("gh,st->ghst", jnp.eye(G), jnp.eye(R))
    W = coupling(params).reshape(G, N, G, N)
    for g in range(G):
        np.testing.assert_allclose(W[g, :, g], weights(Kernel(), group(params, g), MEMBER), atol=1e-6)
        assert not np.any(np.delete(np.asarray(W[g]), g, axis=1))


def test_without_coupling_activations_decay_exactly():
    params, h, u = setting(strength=0.0)
    trajectory = unroll(params, h, jnp.zeros_like(u), dt=0.1)
    rounds = np.arange(1, T + 1)[:, None, None]
    np.testing.assert_allclose(trajectory, 0.9**rounds * np.asarray(h), rtol=1e-5)
    # A constant potential is approached by the same law, and is the fixed point.
    driven = unroll(params, h, jnp.broadcast_to(u[0], u.shape), dt=0.1)
    np.testing.assert_allclose(driven - u[0], 0.9**rounds * np.asarray(h - u[0]), rtol=1e-4, atol=1e-6)


def test_linear_dynamics_are_powers_of_one_matrix():
    params, h, u = setting()
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
    one = unroll(params, h, u, dt=dt, kernel=kernel)
    other = unroll(params, -2.0 * h, u, dt=dt, kernel=kernel)
    distances = np.linalg.norm((one - other).reshape(T, -1), axis=1)
    distances = np.array([3 * np.linalg.norm(h), *distances])
    assert (distances[1:] <= (1 - dt * 0.4) * distances[:-1] * (1 + 1e-5)).all()
    # A fixed point of the driven dynamics satisfies h = sigma(W h) + u.
    u_long = jnp.broadcast_to(u[0], (200, G, N))
    fixed = unroll(params, h, u_long, dt=dt, kernel=kernel)[-1]
    np.testing.assert_allclose(fixed, jnp.tanh(drive(params, fixed, kernel)) + u[0], atol=1e-5)


def test_unroll_is_repeated_stepping():
    params, h, u = setting()
    trajectory = jax.jit(lambda p, h, u: unroll(p, h, u, dt=0.2))(params, h, u)
    assert trajectory.shape == (T, G, N)
    for u_GxN, h_after in zip(u, trajectory, strict=True):
        h = step(params, h, u_GxN, dt=0.2)
        np.testing.assert_allclose(h_after, h, atol=1e-6)


def test_the_potential_is_what_the_undriven_step_leaves_unexplained():
    params, h, u = setting()
    moved = step(params, h, u[0], dt=0.2) - step(params, h, jnp.zeros_like(h), dt=0.2)
    np.testing.assert_allclose(moved / 0.2, u[0], atol=1e-5)


def test_batches_are_one_more_vmap():
    params, h, u = setting()
    hs = jnp.stack([h, 2 * h, -h, jnp.ones_like(h)])
    together = jax.vmap(lambda h: unroll(params, h, u, dt=0.2))(hs)
    for h_one, trajectory in zip(hs, together, strict=True):
        np.testing.assert_allclose(trajectory, unroll(params, h_one, u, dt=0.2), atol=1e-6)


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
    h = jax.random.normal(jax.random.key(1), (64, 4, 300))
    drives = jax.vmap(lambda h: drive(params, h, kernel))(h)
    # Few latent dimensions: one draw's scale wanders by a fifth.
    assert float(jnp.sqrt(jnp.mean(drives**2))) == pytest.approx(0.5, rel=0.25)


def test_the_module_owns_exactly_the_parameters():
    _, h, u = setting()
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
