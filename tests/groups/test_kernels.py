"""Kernels against float64 NumPy formulas, invariances and finite differences. All sizes differ on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import (
    Kernel,
    count_parameters,
    encode,
    forward,
    init_states,
    interaction,
    read,
    weights,
)
from ngc_jax.groups.states import fixed_lift

D_IN, RANK, D_OUTS = 11, 4, {"layers.0.attn.q": 13, "layers.0.attn.k": 6}
Q, K = D_OUTS
KERNELS = [
    Kernel(),
    Kernel("riemannian"),
    Kernel("riemannian", metric_rank=2),
    Kernel("lifted", lift=17, seed=5),
    Kernel("lifted", lift=9, learned=True),
]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}")


def drawn(kernel, seed=0):
    """States with every parameter away from its special starting value (by NumPy: nothing to compile)."""
    shapes = jax.eval_shape(lambda key: init_states(key, kernel, RANK, D_IN, D_OUTS), jax.random.key(0))
    rng = np.random.default_rng(seed)
    states = jax.tree.map(lambda leaf: jnp.asarray(0.6 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    if kernel.name == "lifted":
        states["gain"] += 2.0
    return states


def activations(*shape):
    return jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.float32)


def numpy_weights(kernel, states, member):
    """The kernel's definition, written out in float64."""
    states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), states)
    q_in, q_out = states["input_states"], states["output_states"][member]
    if kernel.name == "bilinear":
        return q_out @ q_in.T
    if kernel.name == "riemannian":
        metric = np.diag(np.exp(states["metric"]["log_diagonal"]))
        if kernel.metric_rank:
            metric = metric + states["metric"]["factor"] @ states["metric"]["factor"].T
        return q_out @ metric @ q_in.T
    lift = states["lift"] if kernel.learned else fixed_lift(RANK, kernel.lift, kernel.seed)
    phi_out = np.diag(states["amplitude"][member]) @ np.tanh(q_out @ lift)
    return phi_out @ np.tanh(q_in @ lift).T * states["gain"] / np.sqrt(D_IN * kernel.lift)


@every_kernel
@pytest.mark.parametrize("member", D_OUTS)
def test_formed_weights_follow_the_definition(kernel, member):
    states = drawn(kernel)
    np.testing.assert_allclose(weights(kernel, states, member), numpy_weights(kernel, states, member), atol=2e-6)


@every_kernel
@pytest.mark.parametrize("d_in", [D_IN, 7])
def test_factored_forward_equals_the_formed_weight(kernel, d_in):
    states = drawn(kernel)
    x = activations(3, 5, d_in)
    signal = jax.jit(encode, static_argnums=0)(kernel, states, x)
    assert signal.shape == (3, 5, kernel.signal_width(RANK))
    for member, d_out in D_OUTS.items():
        W = weights(kernel, states, member, d_in)
        assert W.shape == (d_out, d_in)
        y = jax.jit(read, static_argnums=(0, 2))(kernel, states, member, signal)
        np.testing.assert_allclose(y, x @ W.T, atol=5e-6)
        np.testing.assert_allclose(W, weights(kernel, states, member)[:, :d_in], atol=1e-6)


@every_kernel
def test_a_narrow_member_is_one_padded_with_zeros(kernel):
    states = drawn(kernel)
    x = activations(5, 7)
    padded = jnp.pad(x, ((0, 0), (0, D_IN - 7)))
    np.testing.assert_allclose(forward(kernel, states, K, x), forward(kernel, states, K, padded), rtol=1e-5, atol=1e-6)


@every_kernel
def test_forward_forms_no_weight(kernel):
    """No intermediate value of the forward pass has the weight's two dimensions."""
    big_in, big_out = 400, 300
    states = jax.eval_shape(lambda key: init_states(key, kernel, RANK, big_in, {"a": big_out}), jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, big_in), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda states, x: forward(kernel, states, "a", x))(states, x)
    shapes = [variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars]
    assert not [shape for shape in shapes if big_in in shape and big_out in shape]


@settings(max_examples=25)
@given(
    kernel=st.sampled_from(KERNELS),
    rank=st.integers(1, 8),
    d_in=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.lists(st.integers(0, 3), max_size=2),
)
def test_shapes_and_counts(kernel, rank, d_in, sizes, batch):
    d_outs = {f"block{i}": size for i, size in enumerate(sizes)}
    states = jax.eval_shape(lambda key: init_states(key, kernel, rank, d_in, d_outs), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(states)) == count_parameters(kernel, rank, d_in, sizes)
    x = jax.ShapeDtypeStruct((*batch, d_in), jnp.float32)
    made = jax.eval_shape(
        lambda states, x: {name: (forward(kernel, states, name, x), weights(kernel, states, name)) for name in d_outs},
        states,
        x,
    )
    for name, size in d_outs.items():
        y, W = made[name]
        assert y.shape == (*batch, size)
        assert W.shape == (size, d_in)


@pytest.mark.parametrize("metric_rank", [0, 2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0, 1e4])
def test_the_metric_is_symmetric_and_positive_wherever_the_parameters_are(metric_rank, size):
    kernel = Kernel("riemannian", metric_rank=metric_rank)
    states = init_states(jax.random.key(0), kernel, RANK, D_IN, D_OUTS)
    keys = iter(jax.random.split(jax.random.key(3), 2))
    states["metric"] = jax.tree.map(lambda leaf: size * jax.random.normal(next(keys), leaf.shape), states["metric"])
    metric = np.asarray(interaction(kernel, states), np.float64)
    np.testing.assert_allclose(metric, metric.T, rtol=1e-6)
    assert np.isfinite(metric).all()
    # Positive in exact arithmetic: the diagonal part alone is; the low-rank part adds a square.
    states["metric"].pop("factor", None)
    diagonal = np.diag(interaction(Kernel("riemannian"), states))
    assert (diagonal > 0).all()
    scale = np.sqrt(np.diag(metric))
    assert np.linalg.eigvalsh(metric / np.outer(scale, scale)).min() > -1e-6


@pytest.mark.parametrize("metric_rank", [0, 1, 3, RANK, 99])
def test_the_metric_starts_as_the_identity_and_can_leave_it(metric_rank):
    kernel = Kernel("riemannian", metric_rank=metric_rank)
    states = init_states(jax.random.key(0), kernel, RANK, D_IN, D_OUTS)
    np.testing.assert_allclose(interaction(kernel, states), np.eye(RANK), atol=1e-7)
    target = np.arange(RANK * RANK).reshape(RANK, RANK)
    metric_grad = jax.grad(lambda s: jnp.sum(target * interaction(kernel, s)))(states)["metric"]
    assert all(np.abs(leaf).sum(axis=0).min() > 0 for leaf in jax.tree.leaves(metric_grad))


def test_bilinear_gauge():
    """(Q_in A, Q_out A^-T) is the same network for every invertible A; the riemannian kernel is not so free."""
    states = drawn(Kernel())
    A = np.random.default_rng(0).standard_normal((RANK, RANK)) + 3 * np.eye(RANK)
    turned = {
        "input_states": states["input_states"] @ A,
        "output_states": {name: q @ np.linalg.inv(A).T for name, q in states["output_states"].items()},
    }
    x = activations(5, D_IN)
    for member in D_OUTS:
        np.testing.assert_allclose(
            forward(Kernel(), turned, member, x), forward(Kernel(), states, member, x), atol=1e-5
        )
    metric = {"metric": {"log_diagonal": jnp.arange(RANK) / 2.0}}
    curved = Kernel("riemannian")
    before, after = weights(curved, states | metric, Q), weights(curved, turned | metric, Q)
    assert np.abs(before - after).max() > 0.1


def test_lifted_weights_exceed_the_rank_of_the_states():
    assert np.linalg.matrix_rank(weights(Kernel(), drawn(Kernel()), Q)) == RANK
    kernel = Kernel("lifted", lift=9)
    assert np.linalg.matrix_rank(weights(kernel, drawn(kernel), Q)) == 9


@every_kernel
def test_gradients_equal_finite_differences(kernel):
    """A central difference along a random direction of all parameters and the input at once, in float64."""
    rng = np.random.default_rng(0)
    states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn(kernel))
    point = (states, rng.standard_normal((3, D_IN)))
    directions = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), point)

    with jax.enable_x64(True):

        @jax.jit
        def loss(t):
            states, x = jax.tree.map(lambda p, d: p + t * d, point, directions)
            signal = encode(kernel, states, x)
            return sum(jnp.sum(jnp.sin(read(kernel, states, member, signal))) for member in D_OUTS)

        slope, epsilon = jax.grad(loss)(0.0), 1e-6
        assert slope.dtype == jnp.float64
        np.testing.assert_allclose(slope, (loss(epsilon) - loss(-epsilon)) / (2 * epsilon), rtol=1e-7)


@every_kernel
def test_vmap_over_groups_equals_a_loop(kernel):
    groups = [drawn(kernel, seed) for seed in range(3)]
    x = activations(3, 5, D_IN)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
    together = jax.vmap(lambda states, x: forward(kernel, states, Q, x))(stacked, x)
    one_by_one = jnp.stack([forward(kernel, group, Q, x_g) for group, x_g in zip(groups, x, strict=True)])
    np.testing.assert_allclose(together, one_by_one, atol=1e-6)


@every_kernel
def test_jacobian_of_the_forward_pass_is_the_weight(kernel):
    states, x = drawn(kernel), jnp.linspace(-1, 1, D_IN)
    jacobian = jax.jacfwd(lambda x: forward(kernel, states, Q, x))(x)
    np.testing.assert_allclose(jacobian, weights(kernel, states, Q), atol=2e-6)


@every_kernel
def test_bfloat16_products_are_asked_to_sum_in_float32(kernel):
    """A CPU sums in float32 unasked, so what is asked for is looked at."""
    states = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(kernel))
    jaxpr = jax.make_jaxpr(lambda x: forward(kernel, states, Q, x))(jnp.ones((2, D_IN), jnp.bfloat16))
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= 2
    assert {equation.outvars[0].aval.dtype for equation in products} == {jnp.dtype(jnp.float32)}
    # The two products with the states themselves are of bfloat16 numbers: half the traffic.
    low = [e for e in products if all(operand.aval.dtype == jnp.bfloat16 for operand in e.invars)]
    assert len(low) == 2


@every_kernel
def test_bfloat16_in_bfloat16_out_with_float32_sums(kernel):
    states = init_states(jax.random.key(0), kernel, RANK, 2048, {"a": 13}, jnp.bfloat16)
    # 2,048 ones: summed in bfloat16 they would stall at 256.
    states["input_states"] = jnp.ones_like(states["input_states"])
    x = jnp.ones((2, 2048), jnp.bfloat16)
    y = forward(kernel, states, "a", x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(weights(kernel, states, "a"), np.float64) @ np.ones(2048)
    np.testing.assert_allclose(np.asarray(y[0], np.float64), expected, rtol=0.03, atol=0.02 * np.abs(expected).max())
    assert weights(kernel, states, "a").dtype == jnp.float32


def test_wrong_inputs_are_named():
    states = drawn(Kernel())
    with pytest.raises(UsageError, match="input of width 12 for a group of 11 input states"):
        encode(Kernel(), states, jnp.ones((2, 12)))
    with pytest.raises(UsageError, match=r"no member 'layers\.0\.attn\.qq'; did you mean 'layers\.0\.attn\.q'"):
        read(Kernel(), states, "layers.0.attn.qq", jnp.ones((2, RANK)))
    with pytest.raises(UsageError, match=r"it has layers\.0\.attn\.k, layers\.0\.attn\.q"):
        weights(Kernel(), states, "zz")
