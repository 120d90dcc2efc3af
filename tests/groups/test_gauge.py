"""The fixed gauge: how pivots are chosen, and that the network in it is the same. Sizes differ on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.groups import dynamics
from ngc_jax.groups.gauge import fix_gauge, free_gauge, other_neurons
from ngc_jax.groups.kernels import (
    Kernel,
    count_parameters,
    encode,
    forward,
    init_states,
    input_features,
    read,
    weights,
)
from ngc_jax.groups.modules import Group

BILINEAR = Kernel()


@st.composite
def groups(draw):
    """(Q_in, outputs, scale): any shape; with dead neurons, equal neurons, and columns that are zero or dependent."""
    d_in = draw(st.integers(1, 14))
    rank = draw(st.one_of(st.integers(1, d_in), st.just(d_in)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q_in = rng.standard_normal((d_in, rank)) * 10.0 ** rng.uniform(-4, 4, rank)
    some = st.sets(st.integers(0, max(d_in, rank)), max_size=4)
    for row in draw(some):
        q_in[row % d_in] = q_in[0] * draw(st.sampled_from([0.0, 1.0, -3.0]))
    for column in draw(some):
        q_in[:, column % rank] = q_in @ rng.standard_normal(rank) * draw(st.sampled_from([0.0, 1.0]))
    outputs = [
        rng.standard_normal((d_out, rank)) for d_out in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    ]
    scale = rng.uniform(0.01, 1, d_in)
    scale[[row % d_in for row in draw(some)]] = 0.0
    return q_in, outputs, draw(st.sampled_from([scale, None]))


def coefficients(pivots, rest, scale):
    """The states of the other neurons in scaled coordinates."""
    others = other_neurons(pivots, len(scale))
    return scale[others, None] * rest / scale[list(pivots)]


@given(groups(), st.sampled_from([1.01, 2.0]))
def test_the_network_is_the_same_and_the_states_are_small(group, bound):
    q_in, outputs, scale = group
    d_in, rank = q_in.shape
    pivots, rest, turned = fix_gauge(q_in, outputs, scale, bound=bound)
    assert list(pivots) == sorted(set(pivots))
    assert len(pivots) == rank
    assert set(pivots) <= set(range(d_in))
    assert {type(pivot) for pivot in pivots} == {int}
    assert rest.shape == (d_in - rank, rank)
    full = free_gauge(pivots, rest, d_in)
    np.testing.assert_array_equal(full[list(pivots)], np.eye(rank))
    for before, after in zip(outputs, turned, strict=True):
        # Entry by entry against what was summed there: no neuron's weights drown in another's.
        summed = np.abs(before) @ np.abs(q_in).T
        assert np.all(np.abs(after @ full.T - before @ q_in.T) <= 1e-10 * (summed + summed.max(axis=1, keepdims=True)))
    size = np.ones(d_in) if scale is None or not scale.any() else np.maximum(scale / scale.max(), 1e-6)
    assert np.abs(coefficients(pivots, rest, size)).max(initial=0) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("bound", [1.01, 2.0])
def test_swaps_mend_what_a_greedy_choice_leaves(bound):
    """Kahan's matrix: a greedy choice sees columns of equal length and leaves coefficients that grow as 2^n."""
    n, sine = 60, 0.6
    kahan = np.diag(sine ** np.arange(n)) @ (np.eye(n) - np.sqrt(1 - sine**2) * np.triu(np.ones((n, n)), 1))
    # Rows are neurons; the last one is left over by a greedy choice of n - 1 of them.
    q_in = kahan.T[:, : n - 1] * (1 + 1e-12 * np.arange(n, 0, -1))[:, None]
    greedy = np.linalg.solve(q_in[: n - 1].T, q_in[n - 1])
    assert np.abs(greedy).max() > 100
    pivots, rest, (turned,) = fix_gauge(q_in, [np.eye(n - 1)], bound=bound)
    assert np.abs(rest).max() <= bound * (1 + 1e-9)
    np.testing.assert_allclose(turned @ free_gauge(pivots, rest, n).T, q_in.T, atol=1e-12)


def test_many_swaps_at_once():
    """More than fit into one round, and coefficients nearly as small as any choice of pivots has them."""
    rng = np.random.default_rng(0)
    q_in, output = rng.standard_normal((400, 120)), rng.standard_normal((7, 120))
    pivots, rest, (turned,) = fix_gauge(q_in, [output], bound=1.0001)
    assert np.abs(rest).max() <= 1.0001 * (1 + 1e-9)
    np.testing.assert_allclose(turned @ free_gauge(pivots, rest, 400).T, output @ q_in.T, atol=1e-10)


def test_dead_neurons_are_pivots_only_where_there_is_no_other():
    rng = np.random.default_rng(0)
    q_in = rng.standard_normal((10, 5))
    dead = [0, 3, 4, 8]
    q_in[dead] *= 1e3
    scale = rng.uniform(0.5, 2, 10)
    scale[dead] = 0.0
    assert not set(fix_gauge(q_in, [], scale)[0]) & set(dead)
    square = rng.standard_normal((10, 8))
    square[dead] *= 1e3
    assert set(range(10)) - set(dead) < set(fix_gauge(square, [], scale)[0])
    # Nothing but dead neurons: as if all were alike.
    assert fix_gauge(q_in, [], np.zeros(10))[0] == fix_gauge(q_in, [])[0]


def test_the_size_of_a_neuron_counts():
    """Of two neurons with one state the loud one is the pivot."""
    q_in = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert fix_gauge(q_in, [], [1.0, 1.0, 3.0])[0] == (1, 2)
    assert fix_gauge(q_in, [], [3.0, 1.0, 1.0])[0] == (0, 1)


def test_states_of_lower_rank_than_the_group():
    rng = np.random.default_rng(0)
    q_in = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 6))
    output = rng.standard_normal((5, 6))
    pivots, rest, (turned,) = fix_gauge(q_in, [output])
    np.testing.assert_allclose(turned @ free_gauge(pivots, rest, 12).T, output @ q_in.T, atol=1e-12)
    # Two dimensions say it all; the others have no reader but their own pivot.
    assert np.count_nonzero(np.any(rest != 0, axis=0)) == 2
    nothing, none_left, (silent,) = fix_gauge(np.zeros((4, 3)), [np.ones((2, 3))])
    assert len(nothing) == 3
    assert not none_left.any()
    assert not silent.any()


@pytest.mark.parametrize(
    ("q_in", "outputs", "options", "says"),
    [
        (np.ones((3, 4)), [], {}, r"shape \(3, 4\)"),
        (np.ones(3), [], {}, r"shape \(3,\)"),
        (np.ones((3, 0)), [], {}, "rank from 1"),
        (np.ones((3, 2)), [np.ones((5, 3))], {}, "expected the same rank"),
        (np.full((3, 2), np.nan), [], {}, "not finite"),
        (np.ones((3, 2)), [np.full((5, 2), np.inf)], {}, "not finite"),
        (np.ones((3, 2)), [], {"scale": np.ones(2)}, "for 3 input neurons"),
        (np.ones((3, 2)), [], {"scale": [1.0, -1.0, 1.0]}, "at least 0"),
        (np.ones((3, 2)), [], {"scale": [1.0, np.nan, 1.0]}, "finite size"),
        (np.ones((3, 2)), [], {"bound": 1.0}, "above 1"),
    ],
)
def test_bad_states_are_refused(q_in, outputs, options, says):
    with pytest.raises(UsageError, match=says) as error:
        fix_gauge(q_in, outputs, **options)
    assert "\n" not in str(error.value)


def test_states_that_do_not_fit_their_pivots_are_refused():
    with pytest.raises(UsageError, match=r"shape \(3, 2\) beside 2 pivots of 6 neurons; expected \(4, 2\)"):
        free_gauge((0, 1), np.ones((3, 2)), 6)


# Kernels

D_IN, RANK, D_OUTS, PIVOTS = 11, 4, {"a": 13, "b": 6}, (1, 3, 8, 10)


def fixed(dtype=jnp.float32, rank=RANK, pivots=PIVOTS, d_in=D_IN):
    """States in the fixed gauge, and the same network in the free one (float64)."""
    rng = np.random.default_rng(0)
    rest = rng.standard_normal((d_in - rank, rank))
    outputs = {name: rng.standard_normal((d_out, rank)) for name, d_out in D_OUTS.items()}
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), {"input_states": rest, "output_states": outputs})
    free = {"input_states": free_gauge(pivots, np.asarray(states["input_states"], np.float64), d_in)}
    return states, free | {"output_states": jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), outputs)}


@pytest.mark.parametrize("width", [D_IN, 10, 9, 2, 1, 0])
def test_the_fixed_gauge_computes_what_the_free_one_does(width):
    states, free = fixed()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, width)), jnp.float32)
    signal = jax.jit(encode, static_argnums=0, static_argnames="pivots")(BILINEAR, states, x, pivots=PIVOTS)
    np.testing.assert_allclose(signal, x @ free["input_states"][:width], atol=2e-6)
    for member in D_OUTS:
        W = free["output_states"][member] @ free["input_states"][:width].T
        np.testing.assert_allclose(weights(BILINEAR, states, member, width, pivots=PIVOTS), W, atol=2e-6)
        np.testing.assert_allclose(forward(BILINEAR, states, member, x, pivots=PIVOTS), x @ W.T, atol=1e-5)
    features = input_features(BILINEAR, states, pivots=PIVOTS)
    np.testing.assert_array_equal(features, np.asarray(free["input_states"], np.float32))


def test_at_full_rank_the_signal_is_the_input():
    states, _ = fixed(rank=5, pivots=tuple(range(5)), d_in=5)
    assert states["input_states"].shape == (0, 5)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5)), jnp.float32)
    np.testing.assert_array_equal(encode(BILINEAR, states, x, pivots=range(5)), x)
    np.testing.assert_array_equal(weights(BILINEAR, states, "a", pivots=range(5)), states["output_states"]["a"])
    narrow = encode(BILINEAR, states, x[:, :3], pivots=range(5))
    np.testing.assert_array_equal(narrow, np.pad(x[:, :3], ((0, 0), (0, 2))))


@given(st.data())
def test_counts_are_the_sizes_of_what_is_stored(data):
    d_in = data.draw(st.integers(1, 9))
    rank = data.draw(st.integers(1, d_in))
    pivots = sorted(data.draw(st.sets(st.integers(0, d_in - 1), min_size=rank, max_size=rank)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    d_outs = {f"block{i}": size for i, size in enumerate(sizes)}
    states = jax.eval_shape(
        lambda key: init_states(key, BILINEAR, rank, d_in, d_outs, pivots=pivots), jax.random.key(0)
    )
    stored = sum(leaf.size for leaf in jax.tree.leaves(states))
    assert stored == count_parameters(BILINEAR, rank, d_in, sizes, fixed_gauge=True)
    if rank == d_in:
        assert stored == d_in * sum(sizes)
    module = Group(BILINEAR, rank, d_in, d_outs, pivots=tuple(pivots))
    own = jax.eval_shape(module.init, jax.random.key(0))["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, states)


@pytest.mark.parametrize("rank", [12, 300, 500])
def test_outputs_start_with_the_variance_of_the_inputs(rank):
    pivots = np.sort(np.random.default_rng(0).permutation(500)[:rank]).tolist()
    states = init_states(jax.random.key(0), BILINEAR, rank, 500, {"a": 700, "b": 400}, pivots=pivots)
    for member in ("a", "b"):
        squares = weights(BILINEAR, states, member, pivots=pivots) ** 2
        assert float(jnp.mean(squares.sum(axis=1))) == pytest.approx(1.0, abs=0.05)


def test_gradients_reach_the_stored_states():
    """A central difference along a random direction of all stored states and the input at once, in float64."""
    rng = np.random.default_rng(0)
    states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fixed()[0])
    point = (states, rng.standard_normal((3, D_IN)))
    directions = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), point)
    with jax.enable_x64(True):

        @jax.jit
        def loss(t):
            states, x = jax.tree.map(lambda p, d: p + t * d, point, directions)
            signal = encode(BILINEAR, states, x, pivots=PIVOTS)
            return sum(jnp.sum(jnp.sin(read(BILINEAR, states, member, signal))) for member in D_OUTS)

        slope, epsilon = jax.grad(loss)(0.0), 1e-6
        assert slope.dtype == jnp.float64
        np.testing.assert_allclose(slope, (loss(epsilon) - loss(-epsilon)) / (2 * epsilon), rtol=1e-7)
        grads = jax.grad(lambda s: jnp.sum(encode(BILINEAR, s, jnp.asarray(point[1]), pivots=PIVOTS) ** 2))(states)
        assert np.all(np.abs(grads["input_states"]) > 0)


def test_bfloat16_sums_in_float32():
    """What is asked for is looked at, and 2,048 ones beside a pivot of 256 show that the sum is not rounded early."""
    states = {"input_states": jnp.ones((2048, 2), jnp.bfloat16), "output_states": {}}
    x = jnp.ones((3, 2050), jnp.bfloat16).at[:, 1:3].set(jnp.asarray([257.0, 1.0], jnp.bfloat16))
    encoded = jax.jit(lambda x: encode(BILINEAR, states, x, pivots=(1, 2)))
    assert encoded(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(encoded(x)[0], jnp.asarray([2048 + 256, 2048 + 1], jnp.bfloat16))
    jaxpr = jax.make_jaxpr(lambda x: encode(BILINEAR, states, x, pivots=(1, 2)))(x)
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "add_any", "add") and equation.outvars[0].aval.shape == (3, 2):
            assert equation.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_errors_stay_near_those_of_the_free_gauge(seed):
    """Of a group found by SVD, as conversions make them; both runs against float64."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.standard_normal(160))
    u, s, vt = np.linalg.svd(rng.standard_normal((96, 160)), full_matrices=False)
    s = s * 0.9 ** np.arange(96)
    q_in, q_out = vt[:40].T * s[:40] ** 0.5 / size[:, None], u[:, :40] * s[:40] ** 0.5
    x = size * rng.standard_normal((64, 160))
    exact = x @ q_in @ q_out.T

    def error(q_in, q_out, pivots):
        states = {
            "input_states": jnp.asarray(q_in, jnp.bfloat16),
            "output_states": {"a": jnp.asarray(q_out, jnp.bfloat16)},
        }
        y = forward(BILINEAR, states, "a", jnp.asarray(x, jnp.bfloat16), pivots=pivots)
        return np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)

    pivots, rest, (turned,) = fix_gauge(q_in, [q_out], size)
    in_fixed, in_free = error(rest, turned, pivots), error(q_in, q_out, None)
    print(in_fixed, in_free)  # on failure only; about 0.0055 and 0.0037
    assert in_free < 0.01
    assert in_fixed < 2 * in_free


def test_what_does_not_fit_is_refused():
    states, _ = fixed()
    with pytest.raises(UsageError, match="input of width 12 for a group of 11 input states"):
        encode(BILINEAR, states, jnp.ones((2, 12)), pivots=PIVOTS)
    with pytest.raises(UsageError, match="input of width 12 for a group of 11 input states"):
        weights(BILINEAR, states, "a", 12, pivots=PIVOTS)
    for kernel, pivots in [(BILINEAR, (1, 2)), (Kernel("riemannian"), PIVOTS), (BILINEAR, (1, 3, 8, 11))]:
        with pytest.raises(UsageError, match="pivots for a group of kernel"):
            encode(kernel, states, jnp.ones((2, D_IN)), pivots=pivots)
    with pytest.raises(UsageError, match="'lifted' has no pivots"):
        init_states(jax.random.key(0), Kernel("lifted", lift=9), 4, D_IN, D_OUTS, pivots=PIVOTS)


def test_dynamics_in_the_fixed_gauge():
    """The coupling is that of the formed states; with the module, whose parameters are as few."""
    pivots = (0, 2, 5)
    params = dynamics.init_params(jax.random.key(0), 2, 7, 3, pivots=pivots)
    assert params["states"]["input_states"].shape == (2, 4, 3)
    free = [free_gauge(pivots, rest, 7) for rest in np.asarray(params["states"]["input_states"])]
    freed = {**params, "states": {**params["states"], "input_states": jnp.asarray(np.stack(free))}}
    W = dynamics.coupling(params, pivots=pivots)
    np.testing.assert_allclose(W, dynamics.coupling(freed), atol=1e-6)
    h, u = jnp.linspace(-1, 1, 14).reshape(2, 7), jnp.ones((4, 2, 7))
    expected = dynamics.unroll(freed, h, u, dt=0.2)
    np.testing.assert_allclose(dynamics.unroll(params, h, u, dt=0.2, pivots=pivots), expected, atol=1e-6)
    module = dynamics.Communication(2, 7, 3, dt=0.2, pivots=pivots)
    np.testing.assert_allclose(module.apply({"params": params}, h, u, method="unroll"), expected, atol=1e-6)
    own = jax.eval_shape(module.init, jax.random.key(0), h, u[0])["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
