import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.models.layers import RESIDUALS
from ngc_jax.training.losses import (
    Objective,
    divergence,
    hidden_distance,
    objective_sums,
    output_error,
    weight_error,
)
from tests.tiny import tiny_model

LENGTH = 9


def a_batch():
    rng = np.random.default_rng(1)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    starts = np.where(positions >= 4, 4, 0).astype(np.int32)
    weights = (positions != 0) & (positions != 4)
    positions[1, 7:] = -1
    weights[1, 7:] = False
    weights[0, 2] = False
    return {
        "tokens": jnp.asarray(rng.integers(0, 256, (2, LENGTH)), jnp.int32),
        "positions": jnp.asarray(positions),
        "starts": jnp.asarray(starts),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def models():
    student, teacher = tiny_model("llama", 0), tiny_model("llama_untied", 1)
    return student, teacher


def run(model, batch):
    """Logits in float64 and residuals."""
    (logits, _), sown = model.decoder.apply(
        {"params": model.params}, batch["tokens"], batch["positions"], None, batch["starts"], mutable=[RESIDUALS]
    )
    return np.asarray(logits, np.float64), sown[RESIDUALS]["layers"]


def expected_sums(batch, temperature):
    student, teacher = models()
    (ours, our_layers), (theirs, their_layers) = run(student, batch), run(teacher, batch)
    weights, tokens = np.asarray(batch["weights"]), np.asarray(batch["tokens"])
    sums = {"cross_entropy": 0.0, "divergence": 0.0, "hidden": 0.0}
    for row in range(2):
        for at in range(LENGTH - 1):
            weight = weights[row, at + 1]
            p = scipy.special.softmax(theirs[row, at] / temperature)
            q = scipy.special.softmax(ours[row, at] / temperature)
            sums["divergence"] += weight * temperature**2 * scipy.stats.entropy(p, q)
            sums["cross_entropy"] -= weight * scipy.special.log_softmax(ours[row, at])[tokens[row, at + 1]]
            for layer in ("0", "2"):
                a, b = (np.asarray(x[layer]["output"][0][row, at]) for x in (their_layers, our_layers))
                sums["hidden"] += weight * np.sum((a - b) ** 2) / np.sum(a**2) / 2
    return sums, weights[:, 1:].sum()


@pytest.mark.parametrize("chunk", [2, 256])
def test_sums_are_those_of_the_definitions(chunk):
    batch, (student, teacher) = a_batch(), models()
    objective = Objective(0.5, 2.0, temperature=1.5, hidden=3.0, hidden_layers=(0, -1), chunk=chunk)
    total, count, sums = jax.jit(
        lambda params, theirs: objective_sums(objective, student.decoder, params, batch, (teacher.decoder, theirs))
    )(student.params, teacher.params)
    expected, scored = expected_sums(batch, 1.5)
    assert count == scored
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        total, 0.5 * expected["cross_entropy"] + 2 * expected["divergence"] + 3 * expected["hidden"], rtol=1e-4
    )


def test_sums_add_up_over_parts_of_a_batch_and_padding_has_no_part():
    batch, (student, teacher) = a_batch(), models()
    objective = Objective(1.0, 1.0, top_k=5, hidden=1.0, hidden_layers=(1,))

    @jax.jit
    def evaluate(batch):
        return jax.value_and_grad(
            lambda params: objective_sums(objective, student.decoder, params, batch, (teacher.decoder, teacher.params))[
                0
            ]
        )(student.params)

    whole, whole_gradient = evaluate(batch)
    parts = [evaluate({name: value[row : row + 1] for name, value in batch.items()}) for row in range(2)]
    np.testing.assert_allclose(whole, parts[0][0] + parts[1][0], rtol=1e-5)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-3, atol=1e-4),
        whole_gradient,
        parts[0][1],
        parts[1][1],
    )
    moved = evaluate({**batch, "tokens": batch["tokens"].at[1, 7:].add(1)})[0]
    np.testing.assert_allclose(moved, whole, rtol=1e-6)


def test_no_gradient_flows_into_the_teacher():
    batch, (student, teacher) = a_batch(), models()
    objective = Objective(0.0, 1.0, hidden=1.0, hidden_layers=(0,))

    def total(theirs):
        return objective_sums(objective, student.decoder, student.params, batch, (teacher.decoder, theirs))[0]

    gradient = jax.jit(jax.grad(total))(teacher.params)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.floats(0.3, 4.0))
def test_divergence_over_the_likeliest_and_the_rest(seed, top_k, temperature):
    rng = np.random.default_rng(seed)
    teacher, student = 3 * rng.standard_normal((2, 7))
    p, q = scipy.special.softmax(teacher / temperature), scipy.special.softmax(student / temperature)
    order = np.argsort(-p)
    bins_p = [*p[order[:top_k]], p[order[top_k:]].sum()]
    bins_q = [*q[order[:top_k]], q[order[top_k:]].sum()]
    expected = temperature**2 * sum(a * np.log(a / b) for a, b in zip(bins_p, bins_q, strict=True) if a > 0)
    theirs, ours = jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)
    found = divergence(theirs, ours, temperature=temperature, top_k=top_k)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    assert found <= divergence(theirs, ours, temperature=temperature) + 1e-5


def test_the_mass_of_the_rest_is_kept_where_it_is_tiny():
    teacher = jnp.asarray([40.0, 0.0, 0.0])
    student = jnp.asarray([40.0, 3.0, 0.0])
    gradient = jax.grad(lambda s: divergence(teacher, s, top_k=1))(student)
    assert np.isfinite(gradient).all()
    assert gradient[1] > 0


def test_local_losses_are_means_over_inputs():
    rng = np.random.default_rng(0)
    weight, fitted = rng.standard_normal((2, 5, 4))
    x = rng.standard_normal((300, 4)) * [1, 2, 3, 0.1]
    moment = x.T @ x / len(x)
    expected = np.sum((x @ (weight - fitted).T) ** 2) / np.sum((x @ weight.T) ** 2)
    np.testing.assert_allclose(output_error(*map(jnp.asarray, (weight, fitted, moment))), expected, rtol=1e-4)
    np.testing.assert_allclose(
        weight_error(jnp.asarray(weight), jnp.asarray(fitted)),
        np.sum((weight - fitted) ** 2) / np.sum(weight**2),
        rtol=1e-5,
    )


def test_distance_is_relative_to_each_token():
    teacher = jnp.asarray([[1000.0, 0.0], [1.0, 1.0]])
    found = hidden_distance(teacher, teacher * jnp.asarray([[1.1], [0.5]]))
    np.testing.assert_allclose(found, [0.01, 0.25], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cross_entropy": -1.0}, "at least 0"),
        ({"cross_entropy": 0.0}, "no loss has a weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"hidden": 1.0}, "belong together"),
        ({"hidden_layers": (1,)}, "belong together"),
    ],
)
def test_bad_objectives_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        Objective(**options)


def test_a_missing_teacher_or_layer_is_refused():
    student, _ = models()
    with pytest.raises(UsageError, match="give one"):
        objective_sums(Objective(divergence=1.0), student.decoder, student.params, a_batch())
    with pytest.raises(UsageError, match="3 layers"):
        objective_sums(
            Objective(hidden=1.0, hidden_layers=(3,)),
            student.decoder,
            student.params,
            a_batch(),
            (student.decoder, student.params),
        )
