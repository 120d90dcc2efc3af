"""The distance of two spectra along depth: what it is, its gradient, and that no layout of a batch changes it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.attention import init_cache
from ngc_jax.models.layers import RESIDUALS
from ngc_jax.stability.depth import depth_stability
from ngc_jax.stability.streams import record
from ngc_jax.training import sharding
from ngc_jax.training.loop import LoopConfig, Placed, train
from ngc_jax.training.losses import Objective, objective_sums
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.stability_loss import Pass, draw_tokens, gram_schmidt, local_rates
from ngc_jax.training.step import Constants, Program, init_state, jit_step, pmap_step, train_step
from ngc_jax.training.trainable import merge_params
from tests.models.compact import compact_model, dense_model
from tests.tiny import random_tokens
from tests.training.setting import CountedBatches

KEY = jax.random.key(3)
LENGTH, K = 11, 3


def a_pass(model, batch):
    cache = init_cache(model.config, len(batch["tokens"]), 0, jnp.float32)
    (_, cache), sown = model.decoder.apply(
        {"params": model.params}, batch["tokens"], batch["positions"], cache, batch["starts"], mutable=[RESIDUALS]
    )
    streams = [sown[RESIDUALS]["layers"][str(layer)]["output"][0] for layer in range(model.config.num_layers)]
    return Pass(model.decoder, model.params, streams, cache)


def a_batch(rows=2):
    tokens = jnp.asarray(np.stack([random_tokens(LENGTH, row) for row in range(rows)]))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    starts = np.where((positions >= 5) & (np.arange(rows)[:, None] == 0), 5, 0).astype(np.int32)
    weights = (positions != starts).astype(np.float32)
    positions[1, 8:], weights[1, 8:] = -1, 0
    return {
        "tokens": tokens,
        "positions": jnp.asarray(positions),
        "starts": jnp.asarray(starts),
        "weights": jnp.asarray(weights),
    }


def expected_rates(model, tokens):
    """Of `depth_stability`, whose metric is that of Jacobians formed token by token; relative to the stream."""
    found = depth_stability(model.decoder, model.params, tokens[None], key=KEY, directions=K)
    lengths = np.linalg.norm(record(model.decoder, model.params, tokens).streams, axis=-1)
    return np.asarray(found.local[0]) - np.diff(np.log(lengths), axis=0).T[..., None]


def test_the_rates_are_those_of_the_stability_along_depth_document_by_document():
    model, batch = compact_model("mistral"), a_batch()
    rng = [jax.random.normal(jax.random.fold_in(KEY, t), (24, K)) for t in range(LENGTH)]
    frames = np.linalg.qr(np.stack(rng))[0].astype(np.float32)

    @jax.jit
    def rates(index, frames):
        return local_rates(a_pass(model, batch), batch, index, frames)

    found = np.asarray(rates(jnp.asarray([[7, 9], [7, 2]]), jnp.asarray(frames[[2, 2]])))
    alone, second = expected_rates(model, batch["tokens"][1, :6]), expected_rates(model, batch["tokens"][0, 5:])
    np.testing.assert_allclose(found[1, 1], alone[2], atol=2e-4)
    # The first row's token 7 is the third of a document of its own.
    np.testing.assert_allclose(found[0, 0], second[2], atol=2e-4)
    assert np.abs(found[1, 0] - found[0, 0]).max() > 1e-2


MODEL = dense_model()
OBJECTIVE = Objective(0.0, stability=1.0)


def test_gram_schmidt_is_the_qr_of_every_matrix():
    vectors = np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    frame, growth = gram_schmidt(jnp.asarray(vectors))
    expected, upper = np.linalg.qr(vectors)
    np.testing.assert_allclose(growth, np.log(np.abs(np.diagonal(upper, axis1=2, axis2=3))), atol=1e-5)
    np.testing.assert_allclose(
        np.abs(np.swapaxes(expected, 2, 3) @ frame), np.broadcast_to(np.eye(3), (2, 5, 3, 3)), atol=1e-5
    )
    vectors[0, 0, :, 1] = 2 * vectors[0, 0, :, 0]
    slope = jax.grad(lambda v: jnp.sum(jnp.where(jnp.isfinite(gram_schmidt(v)[1]), gram_schmidt(v)[1], 0)))(vectors)
    assert gram_schmidt(vectors)[1][0, 0, 1] == -np.inf
    assert np.isfinite(slope).all()


@jax.jit
def evaluate(params, theirs, batch):
    """The sum, and its gradient with respect to both models."""

    def total(params, theirs):
        return objective_sums(OBJECTIVE, MODEL.decoder, params, batch, (MODEL.decoder, theirs), key=KEY)[0]

    return jax.value_and_grad(total, (0, 1))(params, theirs)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def other_params():
    """Of a model that is like MODEL, but not the same."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + jnp.asarray(0.15 * p.std() * rng.standard_normal(p.shape), p.dtype), MODEL.params)


def test_no_distance_between_a_model_and_itself():
    value, (slope, _) = evaluate(MODEL.params, MODEL.params, a_batch())
    assert value < 1e-9
    assert all(np.isfinite(leaf).all() for leaf in leaves(slope))


def test_the_gradient_is_that_of_finite_differences_and_the_teacher_gets_none():
    params, theirs, batch = other_params(), MODEL.params, a_batch()
    value, (slope, of_teacher) = evaluate(params, theirs, batch)
    assert 1e-4 < value / batch["weights"].sum() < 10
    assert not any(leaf.any() for leaf in leaves(of_teacher))
    used = {"embed": slope["embed"], "layers": slope["layers"]}
    assert all(leaf.any() for leaf in leaves(used))
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), used)
    length, size = (np.sqrt(sum(np.sum(leaf**2) for leaf in leaves(tree))) for tree in (used, noise))
    # Along itself, where it is greatest, and in a direction that also has another part.
    for mix in (0.0, 1.0):
        direction = jax.tree.map(lambda s, n, mix=mix: s / length + mix * n / size, used, noise)
        expected = sum(np.vdot(a, b) for a, b in zip(leaves(used), leaves(direction), strict=True))
        ends = []
        for h in (2e-3, -2e-3):
            moved = jax.tree.map(lambda p, d, h=h: p + h * d, {name: params[name] for name in used}, direction)
            ends.append(float(evaluate({**params, **moved}, theirs, batch)[0]))
        np.testing.assert_allclose((ends[0] - ends[1]) / 4e-3, expected, rtol=0.02)


def test_padding_and_rows_that_do_not_count_have_no_part():
    params, batch = other_params(), a_batch()

    def value(batch):
        found, (slope, _) = evaluate(params, MODEL.params, batch)
        assert all(np.isfinite(leaf).all() for leaf in leaves(slope))
        return found

    def only(row):
        other = 1 - row
        return {
            **batch,
            "positions": batch["positions"].at[other].set(-1),
            "weights": batch["weights"].at[other].set(0),
        }

    whole = value(batch)
    np.testing.assert_allclose(whole, value(only(0)) + value(only(1)), rtol=1e-4)
    moved = value({**batch, "tokens": batch["tokens"].at[1, 8:].add(1)})
    np.testing.assert_allclose(moved, whole, rtol=1e-5)


def test_tokens_are_drawn_by_weight():
    weights = jnp.asarray([[0, 1, 1, 0, 2, 0], [0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    draw = jax.jit(jax.vmap(lambda key: draw_tokens(key, weights, 3)))
    index = np.asarray(draw(jax.random.split(KEY, 4000)))
    times = np.stack([(index == token).sum(axis=2).mean(axis=0) for token in range(6)], axis=1)
    np.testing.assert_allclose(times[0], [0, 0.75, 0.75, 0, 1.5, 0], atol=0.03)
    np.testing.assert_allclose(times[1], [0, 0, 0, 0, 3, 0])
    np.testing.assert_allclose(times[3], [0, 0.6, 0.6, 0.6, 0.6, 0.6], atol=0.03)
    assert (index[:, 2] == 0).all()


STEPS = 3
ONE = dense_model(num_hidden_layers=1)  # a layer less, half the time to compile


def setting(**options):
    """A program and its parameters: the MLP hears its input too softly, and the norms' scales are to find back."""
    objective = Objective(0.0, stability=0.5, stability_directions=2, stability_tokens=3)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, steps=80))
    program = Program(ONE.decoder, objective, optimizer, ONE.decoder, seed=7)
    layer = ONE.params["layers"]["0"]
    norms = {"attn_norm": layer["attn_norm"], "mlp_norm": {"scale": 0.3 * layer["mlp_norm"]["scale"]}}
    frozen = {**ONE.params, "layers": {"0": {name: layer[name] for name in ("attn", "mlp")}}}
    return dataclasses.replace(program, **options), {"layers": {"0": norms}}, Constants(frozen, ONE.params)


@pytest.fixture(scope="module")
def plain():
    """The compiled step, constants, the state before and after a few steps, and what was found."""
    program, trained, constants = setting()
    step = jit_step(program)
    start = jax.device_get(init_state(program, trained))
    return step, constants, start, *run(step, constants, start)


def run(step, constants, state, steps=STEPS, first=0):
    batches, found = CountedBatches(), []
    batches.next = first
    for _ in range(steps):
        state, metrics = step(jax.device_put(state), constants, next(batches))
        found.append([float(metrics["loss"]), float(metrics["stability"])])
    return jax.device_get(state), np.asarray(found)


def same(state, found, plain):
    np.testing.assert_allclose(found, plain[4], rtol=1e-3)
    # Adam divides by a gradient's size: where that is nearly nothing, rounding decides the sign.
    for a, b in zip(leaves(state.params), leaves(plain[3].params), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-3)
        assert np.mean(np.abs(a - b) > 3e-4) < 0.01


def test_every_step_draws_anew_and_going_on_is_not_having_stopped(plain):
    step, constants, start, state, found = plain
    np.testing.assert_allclose(found[:, 0], 0.5 * found[:, 1], rtol=1e-5)
    _, later = run(step, constants, start.replace(step=np.int32(5)), steps=1)
    assert abs(later[0, 1] - found[0, 1]) > 1e-3 * found[0, 1]
    half, first = run(step, constants, start, steps=1)
    whole, second = run(step, constants, jax.tree.map(np.array, half), steps=STEPS - 1, first=1)
    np.testing.assert_array_equal(np.concatenate([first, second]), found)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_a_mesh_microbatches_and_recomputed_layers_change_nothing(plain, monkeypatch):
    # 259 tokens of vocabulary are a prime number.
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})
    program, trained, constants = setting(microbatches=2, decoder=ONE.decoder.clone(remat=True))
    result = train(
        Placed(program, trained, constants, sharding.make_mesh(2, 2, 2)), CountedBatches(), LoopConfig(STEPS)
    )
    found = [[entry["loss"], entry["stability"]] for entry in result.history]
    same(plain[3].replace(params=result.params), found, plain)


def test_pmap_changes_nothing(plain):
    program, trained, constants = setting()
    state, placed = (sharding.stack_for_pmap(tree) for tree in (init_state(program, trained), constants))
    step, batches, found = pmap_step(program), CountedBatches(), []
    for _ in range(STEPS):
        state, metrics = step(state, placed, sharding.split_for_pmap(next(batches)))
        found.append([float(metrics["loss"][0]), float(metrics["stability"][0])])
    same(jax.tree.map(lambda leaf: leaf[0], jax.device_get(state)), np.asarray(found), plain)


def test_without_weight_nothing_is_drawn_or_computed():
    batch = next(CountedBatches())

    def traced(seed=0, **options):
        program, trained, constants = setting(objective=Objective(0.0, 1.0, chunk=8, **options), seed=seed)
        state = init_state(program, trained)
        return str(jax.make_jaxpr(lambda s, b: train_step(program, s, constants, b))(state, batch))

    plain = re.sub(r"0x[0-9a-f]+", "", traced())
    assert plain == re.sub(r"0x[0-9a-f]+", "", traced(seed=5, stability_directions=9, stability_tokens=9))
    # Nor does the loss itself call LAPACK: see `gram_schmidt`.
    assert not re.search(r"(geqrf|householder_product|triangular_solve|\bqr)\[", traced(stability=1.0))
    for name in ("random_", "searchsorted"):
        assert name not in plain
        assert name in traced(stability=1.0)


def test_training_brings_the_spectra_together(plain):
    """Judged by the stability along depth on other text, with other directions."""
    step, constants, start, *_ = plain
    tokens = jnp.asarray(np.stack([random_tokens(16, seed) for seed in range(100, 104)]))

    def growth(params):
        return depth_stability(ONE.decoder, params, tokens, key=jax.random.key(9), directions=4).growth[:, 1:]

    def distance(params):
        return float(jnp.sqrt(jnp.mean(jnp.square(growth(params) - expected))))

    expected = growth(ONE.params)
    trained, found = run(step, constants, start, steps=80)
    before, after = (distance(merge_params(state.params, constants.frozen)) for state in (start, trained))
    assert found[-10:, 1].mean() < 0.3 * found[:10, 1].mean()
    assert after < 0.6 * before, (before, after)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stability": -1.0}, "weight of stability"),
        ({"stability": 1.0, "stability_tokens": 0}, "at least 1 of each"),
        ({"stability": 1.0, "stability_directions": 0}, "at least 1 of each"),
    ],
)
def test_bad_objectives_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        Objective(**options)


def test_models_that_cannot_be_compared_are_refused():
    model, batch = MODEL, a_batch()

    def total(teacher=model, key=KEY, **options):
        objective = Objective(0.0, stability=1.0, **options)
        shapes = (objective, model.decoder, model.params, batch, (teacher.decoder, teacher.params))
        return jax.eval_shape(lambda: objective_sums(*shapes, key=key))

    with pytest.raises(UsageError, match="25 directions"):
        total(stability_directions=25)
    with pytest.raises(UsageError, match="give a key"):
        total(key=None)
    with pytest.raises(UsageError, match="layer by layer"):
        total(dataclasses.replace(model, config=dataclasses.replace(model.config, iterations=2)))
