"""The step on one device, on meshes and by pmap must be the same step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.errors import UsageError
from ngc_jax.training import sharding
from ngc_jax.training.fit import TrainConfig, prepare
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from ngc_jax.training.step import Constants, Program, gradient_sums, init_state, jit_step, loss_sums, pmap_step
from ngc_jax.training.trainable import merge_params, split_params
from tests.models.compact import dense_model
from tests.tiny import random_tokens

ROWS, LENGTH, STEPS = 16, 12, 3


def student_and_teacher():
    # Sizes that a mesh divides: 24 embed, 40 mlp, 4 x 10 heads, 2 x 10 kv; the vocabulary of 259 it does not.
    teacher = dense_model("llama", num_hidden_layers=1, intermediate_size=40)
    student = convert(teacher, Recipe("svd", keep=0.7, gauge=True), random_tokens(64))
    return student, teacher


@pytest.fixture(scope="module")
def setting():
    student, teacher = student_and_teacher()
    trained, frozen = split_params(student.params, "states_and_norms")
    program = Program(
        student.decoder,
        Objective(0.5, 1.0, chunk=8),
        make_optimizer(OptimizerConfig(learning_rate=1e-2, steps=10, warmup_steps=2)),
        teacher.decoder,
    )
    return program, trained, Constants(frozen, teacher.params)


def batches(rows=ROWS):
    """Ragged: rows have very different numbers of scored tokens."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
        lengths = rng.integers(1, LENGTH + 1, rows)
        positions[positions >= lengths[:, None]] = -1
        yield {
            "tokens": rng.integers(0, 256, (rows, LENGTH)).astype(np.int32),
            "positions": positions,
            "starts": np.zeros((rows, LENGTH), np.int32),
            "weights": (positions > 0).astype(np.float32),
        }


def run(program, trained, constants):
    state, step, losses = init_state(program, trained), jit_step(program), []
    for batch in batches():
        state, metrics = step(state, constants, batch)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def expected(setting):
    return run(*setting)


def same(state, losses, expected, rtol=2e-4):
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    # Adam divides by a gradient's size: where that is nearly nothing, rounding decides the sign.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-4), state.params, expected[0].params)


def test_the_loss_falls_and_only_what_trains_moves(setting, expected):
    program, trained, constants = setting
    state, losses = expected
    _, (count, sums) = jax.jit(lambda p: loss_sums(program, p, constants, next(batches())))(state.params)
    again = 0.5 * sums["cross_entropy"] / count + sums["divergence"] / count
    assert again < losses[0]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), state.params, dict(trained))
    assert all(value > 0 for value in jax.tree.leaves(moved))
    assert int(state.step) == STEPS
    together = merge_params(state.params, constants.frozen)
    assert jax.tree.structure(together) == jax.tree.structure(student_and_teacher()[0].params)


@pytest.mark.parametrize("parts", [2, 8])
def test_microbatches_change_nothing(setting, expected, parts):
    program, trained, constants = setting
    same(*run(dataclasses.replace(program, microbatches=parts), trained, constants), expected)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)])
def test_meshes_change_nothing(setting, expected, shape, monkeypatch):
    program, trained, constants = setting
    # 259 tokens of vocabulary are a prime number.
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})
    mesh = sharding.make_mesh(*shape)
    state = init_state(program, trained)
    shardings = sharding.state_shardings(state, program.optimizer, mesh)
    state = sharding.put(state, shardings)
    placed = Constants(
        *(sharding.put(p, sharding.params_shardings(p, mesh)) for p in (constants.frozen, constants.teacher))
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step, losses = jit_step(program, state_shardings=shardings, replicated=everywhere), []
    for batch in batches():
        state, metrics = step(state, placed, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    same(jax.device_get(state), losses, expected)
    if shape[1] > 1:
        moment = state.opt_state[1][0].mu["groups"]
        split = [leaf for leaf in jax.tree.leaves(moment) if not leaf.sharding.is_fully_replicated]
        assert split


def test_pmap_changes_nothing(setting, expected):
    program, trained, constants = setting
    state = sharding.stack_for_pmap(init_state(program, trained))
    constants = sharding.stack_for_pmap(constants)
    step, losses = pmap_step(program), []
    for batch in batches():
        state, metrics = step(state, constants, sharding.split_for_pmap(batch))
        losses.append(float(metrics["loss"][0]))
    copies = jax.device_get(state)
    for device in range(jax.local_device_count()):
        same(jax.tree.map(lambda x, d=device: x[d], copies), losses, expected)


def test_a_gradient_is_that_of_the_mean_by_finite_differences(setting):
    program, trained, constants = setting
    batch = next(batches())
    compute = jax.jit(lambda p: gradient_sums(program, p, constants, batch))
    gradient, count, _ = compute(trained)
    direction = jax.tree.map(lambda g: g / jnp.sqrt(optax.tree.norm(gradient, squared=True)), gradient)
    size = 0.02
    ahead, behind = (
        compute(jax.tree.map(lambda p, d, s=sign: p + s * size * d, dict(trained), direction))[2]["loss"]
        for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * size), optax.tree.norm(gradient), rtol=2e-2)
    assert count == batch["weights"][:, 1:].sum()


def test_bfloat16_computation_with_float32_parameters(setting):
    """Mixed precision: the loss of rounded weights, float32 gradients, and steps smaller than bfloat16 resolves."""
    student, teacher = student_and_teacher()
    config = TrainConfig(trainable="states_and_norms", dtype="bfloat16", optimizer=OptimizerConfig("sgd", 1e-4))
    prepared = prepare(student, config, setting[0].objective, teacher=teacher)
    decoder = prepared.program.decoder
    assert (decoder.param_dtype, decoder.compute_dtype) == (jnp.float32, jnp.bfloat16)
    trained, constants, batch = prepared.trained, prepared.constants, next(batches())
    assert all(
        leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32) for leaf in jax.tree.leaves(constants.frozen)
    )

    def rounded(leaf):
        return leaf.astype(jnp.bfloat16).astype(jnp.float32) if leaf.ndim > 1 else leaf

    compute = jax.jit(lambda p: gradient_sums(prepared.program, p, constants, batch))
    gradient, _, sums = compute(trained)
    np.testing.assert_array_equal(compute(jax.tree.map(rounded, dict(trained)))[2]["loss"], sums["loss"])
    exact, _, exact_sums = jax.jit(lambda p: gradient_sums(setting[0], p, setting[2], batch))(setting[1])
    np.testing.assert_allclose(sums["loss"], exact_sums["loss"], rtol=1e-2)
    assert sums["loss"] != exact_sums["loss"]
    assert {leaf.dtype for leaf in jax.tree.leaves((gradient, sums))} == {jnp.dtype("float32")}
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, dict(exact)))
    assert difference < 0.1 * optax.tree.norm(exact)

    step, state = jit_step(prepared.program), init_state(prepared.program, trained)
    for batch in batches():
        state, metrics = step(state, constants, batch)
    assert step._cache_size() == 1
    assert metrics["finite"] == 1
    before, after = (jax.tree.leaves(tree["groups"]) for tree in (dict(trained), state.params))
    assert all(leaf.dtype == jnp.float32 for leaf in after)
    moved = [np.mean(a != b) for a, b in zip(after, before, strict=True)]
    seen = [np.mean(np.asarray(rounded(a) != rounded(b))) for a, b in zip(after, before, strict=True)]
    assert min(moved) > 0.9
    assert max(seen) < 0.5


def test_a_loss_that_is_not_finite_leaves_the_parameters_alone(setting):
    program, trained, constants = setting
    broken = jax.tree.map(lambda leaf: leaf, dict(trained))
    path = next(iter(broken["groups"]))
    broken["groups"][path] = jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.nan), broken["groups"][path])
    state = init_state(program, broken)
    before = jax.device_get(state)
    after, metrics = jit_step(program)(state, constants, next(batches()))
    assert metrics["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(after.params))
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, jax.device_get(after.opt_state))


def test_scales_by_path():
    config = OptimizerConfig("sgd", 1.0, schedule="constant", clip_norm=None, scales={"input": 0.0, "a/.*states": 2.0})
    optimizer = make_optimizer(config)
    params = {
        "groups": {"a": {"input_states": jnp.ones(2), "output_states": {"layers.0.attn.q": jnp.ones(2)}}, "b": 1.0}
    }
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["groups"]["a"]["input_states"], [0, 0])
    np.testing.assert_array_equal(updates["groups"]["a"]["output_states"]["layers.0.attn.q"], [-2, -2])
    assert updates["groups"]["b"] == -1


def test_schedules():
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, steps=14, final_fraction=0.5))
    np.testing.assert_allclose(rate(0), 0.4)
    np.testing.assert_allclose(rate(4), 2.0)
    np.testing.assert_allclose(rate(9), 1.5)
    np.testing.assert_allclose(rate(14), 1.0)
    assert learning_rate_schedule(OptimizerConfig(schedule="constant", learning_rate=3.0))(7) == 3.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "adamww"}, "no optimiser"),
        ({"name": "apply_updates"}, "no optimiser"),
        ({"options": {"betta": 1}}, "does not take"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": 2000}, "warm-up"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"scales": {"(": 1.0}}, "regular expression"),
    ],
)
def test_bad_optimisers_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        make_optimizer(OptimizerConfig(**options))


def test_bad_meshes_and_parameters_are_refused():
    with pytest.raises(UsageError, match="does not fit 8 devices"):
        sharding.make_mesh(3, 1, 1)
    mesh = sharding.make_mesh(1, 4, 2)
    spec = partial(sharding.partition_spec, mesh=mesh)
    assert spec("layers/0/attn/q/kernel", (40, 24)) == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert spec("groups/a/input_states", (23, 7)) == jax.sharding.PartitionSpec(None, None)
    with pytest.raises(UsageError, match="not divisible by 4"):
        spec("layers/0/attn/q/kernel", (40, 22))
    with pytest.raises(UsageError, match="no sharding rule"):
        spec("layers/0/attn/q/colonel", (40, 22))
    with pytest.raises(UsageError, match="dimensions"):
        spec("layers/0/attn/q/kernel", (40,))
    with pytest.raises(UsageError, match="no neuron states"):
        split_params(dense_model("llama", num_hidden_layers=1).params, "states")
