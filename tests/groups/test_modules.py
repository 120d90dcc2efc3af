import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import Kernel, encode, init_states, read, weights
from ngc_jax.groups.modules import Group, Groups
from ngc_jax.groups.plan import Block, GroupPlan, Plan

PLAN = Plan(
    groups=(
        GroupPlan(
            "layers.0.qkv",
            (
                Block("layers.0.attn.q", d_out=12, d_in=10, bias=True),
                Block("layers.0.attn.k", d_out=6, d_in=10),
            ),
            rank=3,
        ),
        GroupPlan(
            "layers.0-1.od",
            (Block("layers.0.attn.o", d_out=10, d_in=12), Block("layers.1.mlp.d", d_out=10, d_in=24)),
            rank=4,
            kernel=Kernel("riemannian", metric_rank=2),
        ),
        GroupPlan(
            "layers.1.u",
            (Block("layers.1.mlp.u", d_out=24, d_in=10),),
            rank=5,
            kernel=Kernel("lifted", lift=11, learned=True),
        ),
    ),
    dense=(Block("layers.1.mlp.g", d_out=24, d_in=10),),
)


class Shell(nn.Module):
    """Stands for the decoder: it owns the groups under the name `groups`."""

    @nn.compact
    def __call__(self):
        return Groups(PLAN, name="groups")()


def test_the_parameter_tree_is_exactly_the_plan_s():
    params = jax.eval_shape(Shell().init, jax.random.key(0))["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "groups": {
            "layers.0.qkv": {
                "input_states": (10, 3),
                "output_states": {"layers.0.attn.q": (12, 3), "layers.0.attn.k": (6, 3)},
            },
            "layers.0-1.od": {
                "input_states": (24, 4),
                "output_states": {"layers.0.attn.o": (10, 4), "layers.1.mlp.d": (10, 4)},
                "metric": {"log_diagonal": (4,), "factor": (4, 2)},
            },
            "layers.1.u": {
                "input_states": (10, 5),
                "output_states": {"layers.1.mlp.u": (24, 5)},
                "gain": (),
                "amplitude": {"layers.1.mlp.u": (24,)},
                "lift": (5, 11),
            },
        }
    }
    stored = sum(leaf.size for leaf in jax.tree.leaves(params))
    dense, bias = 24 * 10, 12
    assert stored + dense + bias == PLAN.count_parameters()


def test_groups_return_their_parameters_untouched():
    shapes = jax.eval_shape(Shell().init, jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    returned = jax.jit(Shell().apply)(variables)
    assert jax.tree.structure(returned) == jax.tree.structure(variables["params"]["groups"])
    jax.tree.map(np.testing.assert_array_equal, returned, variables["params"]["groups"])


def test_groups_start_unlike_one_another():
    twins = Plan(tuple(GroupPlan(name, (Block(f"{name}.w", 7, 5),), rank=2) for name in ("a", "b")))
    states = jax.jit(Groups(twins).init)(jax.random.key(0))["params"]
    assert not np.allclose(states["a"]["input_states"], states["b"]["input_states"])


def test_group_methods_are_the_pure_functions():
    kernel, d_outs = Kernel("riemannian", metric_rank=1), {"a": 7, "b": 4}
    states = init_states(jax.random.key(0), kernel, 3, 9, d_outs)
    group, variables = Group(kernel, 3, 9, d_outs), {"params": states}
    x = jax.random.normal(jax.random.key(1), (2, 9))
    signal = group.apply(variables, x, method="encode")
    np.testing.assert_array_equal(signal, encode(kernel, states, x))
    np.testing.assert_array_equal(group.apply(variables, "b", signal, method="read"), read(kernel, states, "b", signal))
    np.testing.assert_array_equal(group.apply(variables, "a", 6, method="weights"), weights(kernel, states, "a", 6))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_have_the_type_asked_for(dtype):
    variables = jax.eval_shape(Groups(PLAN, param_dtype=dtype).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}


def test_full_size_groups_by_shape_alone():
    """A group of a 70-billion-parameter model, without its memory."""
    block = Block("layers.79.mlp.u", d_out=28672, d_in=8192)
    plan = Plan((GroupPlan("u", (block,), rank=2048, kernel=Kernel("riemannian", metric_rank=16)),))
    variables = jax.eval_shape(Groups(plan).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == plan.count_parameters()


def test_a_rank_that_the_kernel_does_not_admit_is_refused():
    with pytest.raises(UsageError, match="raise lift"):
        Group(Kernel("lifted", lift=3), 3, 9, {"a": 7}).init(jax.random.key(0))


def test_a_model_with_groups_is_trained_through_its_module():
    """Gradient steps on the module's own parameters reach weights of the same rank (there is an exact fit)."""
    kernel, d_outs = Kernel(), {"a": 7, "b": 4}
    group = Group(kernel, 3, 9, d_outs)
    x = jax.random.normal(jax.random.key(1), (64, 9))
    wanted = jax.random.normal(jax.random.key(2), (9, 3)) @ jax.random.normal(jax.random.key(3), (3, 7)) / 3

    def loss(variables):
        signal = group.apply(variables, x, method="encode")
        return jnp.mean((group.apply(variables, "a", signal, method="read") - x @ wanted) ** 2)

    @jax.jit
    def train(variables):
        def body(variables, _):
            value, grads = jax.value_and_grad(loss)(variables)
            return jax.tree.map(lambda p, g: p - 0.3 * g, variables, grads), value

        return jax.lax.scan(body, variables, length=600)[1]

    losses = train(group.init(jax.random.key(0)))
    assert losses[-1] < 1e-3 * losses[0]
