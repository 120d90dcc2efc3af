import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import Kernel, from_bilinear, init_states, logical_axes, weights
from ngc_jax.groups.states import fixed_lift

KERNELS = [
    Kernel(),
    Kernel("riemannian", metric_rank=3),
    Kernel("lifted", lift=40),
    Kernel("lifted", lift=300, learned=True),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}")
def test_outputs_keep_the_variance_of_the_inputs(kernel):
    """For x of independent entries of variance 1, the variance of y_j is the square of W's row j."""
    d_in, d_outs = 500, {"a": 700, "b": 400}
    states = init_states(jax.random.key(0), kernel, 12, d_in, d_outs)
    for member in d_outs:
        squares = weights(kernel, states, member) ** 2
        assert float(jnp.mean(squares.sum(axis=1))) == pytest.approx(1.0, abs=0.12)
        assert float(jnp.mean(squares[:, :125].sum(axis=1))) == pytest.approx(0.25, abs=0.05)
        # Every neuron has about that scale: it is not the average of a few.
        assert float(jnp.std(squares.sum(axis=1))) < 1.0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}")
def test_states_depend_on_the_key_alone_and_take_the_type_asked_for(kernel):
    def draw(key, dtype=jnp.float32):
        return init_states(jax.random.key(key), kernel, 5, 9, {"a": 7, "b": 3}, dtype)

    for one, same, in_bf16 in zip(
        *(jax.tree.leaves(t) for t in (draw(1), draw(1), draw(1, jnp.bfloat16))), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert in_bf16.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one.astype(jnp.bfloat16), in_bf16)
    assert not np.array_equal(draw(1)["input_states"], draw(2)["input_states"])
    assert not np.array_equal(draw(1)["output_states"]["a"][:3], draw(1)["output_states"]["b"])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}")
def test_every_parameter_has_named_axes_of_its_own_rank(kernel):
    states = init_states(jax.random.key(0), kernel, 5, 9, {"a": 7, "b": 3})
    axes = logical_axes(kernel)
    named = set()
    for path, leaf in jax.tree.leaves_with_path(states):
        keys = [key.key for key in path]
        name = keys[0] if keys[0] in ("output_states", "amplitude") else ".".join(keys)
        assert len(axes[name]) == leaf.ndim
        named.add(name)
    assert named == set(axes)


@pytest.mark.parametrize(
    "kernel",
    [Kernel("riemannian"), Kernel("riemannian", metric_rank=2)],
    ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}",
)
def test_a_riemannian_group_starts_as_the_bilinear_one(kernel):
    bilinear = init_states(jax.random.key(0), Kernel(), 5, 9, {"a": 7, "b": 3})
    started = from_bilinear(kernel, bilinear)
    for member in ("a", "b"):
        np.testing.assert_allclose(weights(kernel, started, member), weights(Kernel(), bilinear, member), atol=1e-6)


@pytest.mark.parametrize(
    "kernel",
    [Kernel("lifted", lift=24), Kernel("lifted", lift=6, learned=True)],
    ids=lambda k: f"{k.name}-{k.metric_rank or k.lift}",
)
def test_a_lifted_group_tends_to_the_bilinear_one(kernel):
    """The error falls with the square of the states' size, as tanh's cubic term demands."""
    bilinear = init_states(jax.random.key(0), Kernel(), 5, 9, {"a": 7, "b": 3})
    bilinear["output_states"]["a"] *= 4.0
    shapes = jax.eval_shape(lambda: init_states(jax.random.key(0), kernel, 5, 9, {"a": 7, "b": 3}))
    with jax.enable_x64(True):
        bilinear = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), bilinear)
        errors = []
        for size in (0.1, 0.01):
            started = from_bilinear(kernel, bilinear, size)
            assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, shapes)
            W = weights(Kernel(), bilinear, "a")
            errors.append(float(jnp.abs(weights(kernel, started, "a") - W).max() / jnp.abs(W).max()))
        assert errors[0] < 0.1
        assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_the_fixed_lift_is_orthogonal_reproducible_and_read_only():
    projection = fixed_lift(6, 20, 3)
    np.testing.assert_allclose(projection @ projection.T, 20 / 6 * np.eye(6), atol=1e-12)
    assert not np.allclose(projection, fixed_lift(6, 20, 4))
    assert not projection.flags.writeable
    # Saved models hold the seed only: these numbers may never change.
    np.testing.assert_allclose(
        fixed_lift(2, 3, 0),
        [
            [0.7858970816691656, 0.4360342975001278, 0.8320095362599268],
            [0.07483095688277243, 1.0522906019958065, -0.6221614073882366],
        ],
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("rank", "d_in", "d_outs", "says"),
    [
        (0, 9, {"a": 7}, "rank 0"),
        (2, 0, {"a": 7}, "input has 0 neurons"),
        (2, 9, {"a": 7, "b": 0}, "b has 0 neurons"),
        (2, 9, {}, "no members"),
    ],
)
def test_impossible_sizes_are_refused(rank, d_in, d_outs, says):
    with pytest.raises(UsageError, match=says):
        init_states(jax.random.key(0), Kernel(), rank, d_in, d_outs)


def test_a_start_needs_a_size():
    bilinear = init_states(jax.random.key(0), Kernel(), 5, 9, {"a": 7})
    with pytest.raises(UsageError, match="size is 0"):
        from_bilinear(Kernel("lifted", lift=8), bilinear, 0.0)
    with pytest.raises(UsageError, match="raise lift"):
        from_bilinear(Kernel("lifted", lift=5), bilinear)
