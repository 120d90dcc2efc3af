"""Rounding, against its definition step by step and against least squares."""

import numpy as np
import pytest

from ngc_jax.conversion import rounding
from ngc_jax.conversion.rounding import Grid, conditional_variances, round_to_nearest, round_with_feedback
from ngc_jax.groups.quantised import unpack


def correlated(width, seed=0):
    """A second moment of strongly correlated inputs."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((40 * width, width // 3)) @ generator.standard_normal((width // 3, width))
    x += 0.3 * generator.standard_normal(x.shape)
    return x.T @ x / len(x)


def loss(matrix, weight, second_moment):
    error = np.asarray(matrix.dequantise(), np.float64) - weight
    return float(np.einsum("ji,ik,jk->", error, second_moment, error))


def codes_of(matrix):
    parts = np.stack([np.asarray(part) for part in unpack(matrix.codes, matrix.bits)], axis=1)
    return parts.reshape(-1, parts.shape[-1])[: matrix.shape[matrix.axis]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_nearest_number_of_the_grid_is_at_most_half_a_step_away(bits, symmetric):
    weight = np.random.default_rng(1).standard_normal((6, 70)) + 0.5
    small = round_to_nearest(weight, Grid(bits, 32, symmetric))
    assert small.offsets is None if symmetric else small.offsets.shape == (3, 6)
    step = np.repeat(np.abs(small.scales.astype(float)), 32, axis=0)[:70].T
    error = np.abs(np.asarray(small.dequantise()) - weight)
    # A symmetric grid has one number fewer above 0 than below; scales and offsets are rounded, too.
    inside = error <= 0.5 * step + 2e-3 * np.abs(weight).max()
    assert inside.mean() > (0.9 if symmetric else 0.9999)
    assert (error <= 1.01 * step).all()


def test_a_constant_and_a_zero_matrix_are_exact():
    for weight in (np.zeros((2, 40)), np.full((2, 40), 0.25)):
        for symmetric in (True, False):
            np.testing.assert_array_equal(round_to_nearest(weight, Grid(4, 32, symmetric)).dequantise(), weight)


def test_a_better_range_is_found():
    weight = np.random.default_rng(2).standard_t(3, (20, 64))
    plain, searched = (round_to_nearest(weight, Grid(3, 64, True), search=search) for search in (False, True))
    assert loss(searched, weight, np.eye(64)) < 0.9 * loss(plain, weight, np.eye(64))


def test_numbers_outside_float16_have_scales_in_bfloat16():
    for size in (1e-9, 1e7):
        weight = size * np.random.default_rng(3).standard_normal((3, 40))
        small = round_to_nearest(weight, Grid(8, 32, True))
        assert str(small.scales.dtype) == "bfloat16"
        np.testing.assert_allclose(small.dequantise(), weight, atol=0.03 * size)


def test_feedback_is_least_squares_step_by_step(monkeypatch):
    """Each number is rounded after the remaining ones have been fitted again by least squares."""
    monkeypatch.setattr(rounding, "_BLOCK", 7)
    weight, moment, grid = np.random.default_rng(4).standard_normal((5, 40)), correlated(40), Grid(4, 32, True)
    small = round_with_feedback(weight, moment, grid)
    damped = moment + rounding._DAMPING * np.diag(moment).mean() * np.eye(40)
    scales = np.repeat(small.scales.astype(float), 32, axis=0)[:40].T
    order = np.argsort(-np.diag(moment), kind="stable")
    error, wanted = np.zeros((5, 40)), np.zeros((5, 40), int)
    for step, i in enumerate(order):
        done, left = order[:step], order[step:]
        # Minimise over the weights on the inputs that are left: W + (W - Q) C[done, left] C[left, left]^-1.
        change = np.linalg.solve(damped[np.ix_(left, left)], damped[np.ix_(left, done)] @ error[:, done].T).T
        wanted[:, i] = np.clip(np.rint((weight[:, i] + change[:, 0]) / scales[:, i]), -8, 7)
        error[:, i] = weight[:, i] - wanted[:, i] * scales[:, i]
    assert (wanted == codes_of(small).T).mean() > 0.98  # float32 against float64: ties aside


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_halves_the_loss_of_rounding_where_inputs_are_correlated(bits, symmetric):
    weight, moment = np.random.default_rng(5).standard_normal((30, 96)), correlated(96)
    grid = Grid(bits, 32, symmetric)
    assert loss(round_with_feedback(weight, moment, grid), weight, moment) < 0.5 * loss(
        round_to_nearest(weight, grid), weight, moment
    )


def test_a_matrix_and_its_transpose_have_the_same_codes():
    weight, moment, grid = np.random.default_rng(6).standard_normal((9, 48)), correlated(48), Grid(4, 32, False)
    for one, other in (
        (round_with_feedback(weight, moment, grid), round_with_feedback(weight.T, moment, grid, axis=0)),
        (round_to_nearest(weight, grid), round_to_nearest(weight.T, grid, axis=0)),
    ):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(np.asarray(one.dequantise()).T, other.dequantise())


def test_too_few_tokens_and_silent_inputs_do_no_harm():
    x = np.random.default_rng(7).standard_normal((5, 48))
    x[:, 10:20] = 0
    weight = np.random.default_rng(8).standard_normal((4, 48))
    for moment in (x.T @ x / 5, np.zeros((48, 48)), x.T @ x / 5 - 1e-7 * np.eye(48)):
        small = round_with_feedback(weight, moment, Grid(4, 32, True))
        assert np.isfinite(np.asarray(small.dequantise())).all()


def test_feedback_along_outputs_is_least_squares_step_by_step_too(monkeypatch):
    """As before, with all numbers of the matrix in one system, input by input: its matrix is a Kronecker product."""
    monkeypatch.setattr(rounding, "_BLOCK", 7)
    rows, width, grid = 6, 20, Grid(4, 32, False)
    weight = np.random.default_rng(5).standard_normal((rows, width))
    moment, metric = correlated(width), correlated(rows, seed=1)
    small = round_with_feedback(weight, moment, grid, metric=metric)
    scales, offsets = (part.astype(float)[0] for part in (small.scales, small.offsets))
    damped = [part + rounding._DAMPING * np.diag(part).mean() * np.eye(len(part)) for part in (moment, metric)]
    system = np.kron(*damped)
    inputs, outputs = (np.argsort(-np.diag(part), kind="stable") for part in (moment, metric))
    order = [i * rows + j for i in inputs for j in outputs]
    error, wanted = np.zeros(rows * width), np.zeros((rows, width), int)
    for step, place in enumerate(order):
        done, left = order[:step], order[step:]
        change = np.linalg.solve(system[np.ix_(left, left)], system[np.ix_(left, done)] @ error[done])
        i, j = divmod(place, rows)
        wanted[j, i] = np.clip(np.rint((weight[j, i] + change[0] - offsets[j]) / scales[j]), -8, 7)
        error[place] = weight[j, i] - wanted[j, i] * scales[j] - offsets[j]
    assert (wanted == codes_of(small).T).mean() > 0.98


def test_what_both_sides_are_worth():
    weight, grid = np.random.default_rng(6).standard_normal((48, 64)), Grid(3, 64, True)
    moment, metric = correlated(64), correlated(48, seed=1)

    def cost(matrix):
        error = np.asarray(matrix.dequantise(), np.float64) - weight
        return float(np.sum((metric @ error) * (error @ moment)))

    inputs = round_with_feedback(weight, moment, grid)
    assert cost(round_with_feedback(weight, moment, grid, metric=metric)) < 0.6 * cost(inputs)
    # Rows that do not matter to each other are rounded each for itself.
    apart = round_with_feedback(weight, moment, grid, metric=np.diag(np.linspace(1, 2, 48)))
    assert (codes_of(apart) == codes_of(inputs)).mean() > 0.99


def test_the_loss_of_rounding_is_what_its_theory_says():
    """Each error costs its input's conditional variance, and a step's uniform error has a twelfth of its square."""
    weight, moment, grid = np.random.default_rng(9).standard_normal((2000, 64)), correlated(64), Grid(8, 64, True)
    small = round_with_feedback(weight, moment, grid)
    step = np.sqrt(np.square(np.asarray(small.scales, np.float64)).mean())
    expected = len(weight) * conditional_variances(moment).sum() * step**2 / 12
    damped = moment + rounding._DAMPING * np.diag(moment).mean() * np.eye(64)
    assert 0.95 < loss(small, weight, damped) / expected < 1.05
