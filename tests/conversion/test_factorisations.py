import copy
import dataclasses
import itertools

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.conversion.alternating import alternate, best_outputs, pooled_states
from ngc_jax.conversion.closed_form import DAMPING, best_states, square_root
from ngc_jax.conversion.factorisations import FACTORISATIONS
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.errors import UsageError


def inputs(width, count=200, seed=0, scale=True):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((count, width)) @ generator.standard_normal((width, width))
    return x * np.logspace(0, -2, width) if scale else x


def statistics(x, fisher=None):
    return Statistics(len(x), x.T @ x / len(x), np.abs(x).mean(0), fisher, site=str(x.sum()))


def weight(d_out, d_in, seed=1):
    return np.random.default_rng(seed).standard_normal((d_out, d_in))


def loss(approximation, exact, second_moment):
    error = approximation - exact
    return np.trace(error @ second_moment @ error.T)


def published(name, w, stats, rank):
    """Each baseline as its authors write it: scale the weight, truncate its SVD, undo the scale."""
    if name == "svd":
        scale = np.eye(w.shape[1])
    elif name == "fwsvd":
        scale = np.diag(np.sqrt(stats.fisher))
    elif name == "asvd":
        scale = np.diag(np.sqrt(stats.absolute_mean))
    else:
        scale = np.linalg.cholesky(stats.second_moment)
    u, s, vt = np.linalg.svd(w @ scale, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(scale)


@pytest.mark.parametrize("name", ["svd", "fwsvd", "asvd", "svd_llm"])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (11, 11)])
def test_baselines_are_what_their_authors_publish(name, shape):
    x = inputs(shape[1])
    stats = statistics(x, fisher=np.random.default_rng(3).uniform(0.1, 2, shape[1]))
    w = weight(*shape)
    for rank in (1, 4, 8):
        (ours,) = FACTORISATIONS[name].function([w], [stats], rank).weights()
        np.testing.assert_allclose(ours, published(name, w, stats, rank), rtol=1e-3, atol=1e-5)


def test_ngc_paper_is_the_published_recipe():
    """SVD of stacked inputs times stacked weights for the output states, least squares for the input states."""
    x, ws = inputs(10), [weight(7, 10, 1), weight(5, 10, 2)]
    stats = statistics(x)
    y = x @ np.concatenate(ws).T
    output_states = np.linalg.svd(y, full_matrices=False)[2][:6].T
    input_states = scipy.linalg.lstsq(x, y @ output_states)[0]
    ours = np.concatenate(FACTORISATIONS["ngc_paper"].function(ws, [stats, stats], 6).weights())
    np.testing.assert_allclose(ours, output_states @ input_states.T, rtol=1e-6, atol=1e-8)


def test_the_low_rank_svd_of_ngc_paper_comes_near_the_exact_one():
    x, w = inputs(90, count=400), weight(70, 90)
    stats = statistics(x)
    paper, exact = (FACTORISATIONS[name].function([w], [stats], 20).weights()[0] for name in ("ngc_paper", "ngc"))
    best = loss(exact, w, stats.second_moment)
    assert best < loss(paper, w, stats.second_moment) < 1.05 * best


def test_basis_sharing_pools_the_second_moments():
    ws, xs = [weight(6, 9, 1), weight(6, 9, 2)], [inputs(9, seed=1), inputs(9, seed=2)]
    stats = [statistics(x) for x in xs]
    pooled = Statistics(1, stats[0].second_moment + stats[1].second_moment, np.zeros(9))
    ours = np.concatenate(FACTORISATIONS["basis_sharing"].function(ws, stats, 5).weights())
    np.testing.assert_allclose(ours, published("svd_llm", np.concatenate(ws), pooled, 5), rtol=1e-3, atol=1e-5)


def gradients(outputs, count=150, seed=5, weight=None, geometry="full"):
    """What backward passes would measure, from gradients (count, outputs) that are given."""
    generator = np.random.default_rng(seed)
    g = generator.standard_normal((count, outputs)) @ generator.standard_normal((outputs, outputs))
    moment = g.T @ g / count
    pulled = moment if weight is None or outputs <= weight.shape[1] else weight.T @ moment @ weight
    return OutputGradients(count, np.diag(moment).copy(), pulled if geometry == "full" else None), moment


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_best_states_reach_the_bound_of_eckart_and_young(m, n, rank, seed, two_sided):
    rank = min(rank, m, n)
    w, c = weight(m, n, seed), statistics(inputs(n, seed=seed)).second_moment
    measured, g = gradients(m, weight=w) if two_sided else (None, np.eye(m))
    left = np.linalg.cholesky(g + DAMPING * np.diag(g).mean() * np.eye(m) * two_sided).T
    states = best_states([w], c, [measured])
    approximation = states.truncated(rank).weights()[0]
    values = np.linalg.svd(left @ w @ square_root(c), compute_uv=False)
    # Directions that the loss hardly sees are only resolved to the ridge.
    slack = 1e-6 * (values**2).sum()
    assert loss(left @ approximation, left @ w, c) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-5, abs=slack)
    np.testing.assert_allclose(states.energies, values**2, rtol=1e-5, atol=slack)


@pytest.mark.parametrize("geometry", ["full", "diagonal"])
def test_members_with_one_input_share_the_best_states_of_their_block_diagonal_metric(geometry):
    ws, c = [weight(7, 10, 1), weight(12, 10, 2), weight(3, 10, 3)], statistics(inputs(10)).second_moment
    measured, moments = zip(*[gradients(len(w), seed=len(w), weight=w, geometry=geometry) for w in ws], strict=True)
    if geometry == "diagonal":
        moments = [np.diag(np.diag(g)) for g in moments]
    roots = [np.linalg.cholesky(g + DAMPING * np.diag(g).mean() * np.eye(len(g))).T for g in moments]
    left = scipy.linalg.block_diag(*roots)
    states = best_states(ws, c, measured).truncated(4)
    stacked = np.concatenate(ws)
    tail = np.linalg.svd(left @ stacked @ square_root(c), compute_uv=False)[4:]
    found = loss(left @ np.concatenate(states.weights()), left @ stacked, c)
    assert found == pytest.approx((tail**2).sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_full_rank_is_exact_even_when_the_second_moment_is_singular(shape):
    x = inputs(shape[1], count=3)  # fewer tokens than inputs
    w = weight(*shape)
    for name in ("svd", "svd_llm", "basis_sharing", "ngc_paper", "ngc"):
        (ours,) = FACTORISATIONS[name].function([w], [statistics(x)], min(shape)).weights()
        np.testing.assert_allclose(ours, w, rtol=1e-4, atol=1e-5)


def test_all_zero_statistics_fall_back_to_the_weight_alone():
    w = weight(6, 8)
    (ours,) = FACTORISATIONS["ngc"].function([w], [Statistics(1, np.zeros((8, 8)), np.zeros(8))], 6).weights()
    np.testing.assert_allclose(ours, w, atol=1e-6)


def test_sharing_the_same_input_is_exact_and_ordered():
    """One shared solution: no other states of that rank do better, however they are found."""
    x, ws = inputs(8), [weight(7, 8, 1), weight(3, 8, 2), weight(4, 8, 3)]
    stats = statistics(x)
    c, stacked = stats.second_moment, np.concatenate(ws)
    states = FACTORISATIONS["ngc"].function(ws, [stats] * 3, 4)
    best = loss(np.concatenate(states.weights()), stacked, c)
    generator = np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            moved_in = states.input_states + size * generator.standard_normal(states.input_states.shape)
            moved_out = [q + size * generator.standard_normal(q.shape) for q in states.output_states]
            assert loss(np.concatenate([q @ moved_in.T for q in moved_out]), stacked, c) > best
    # The first neurons of the latent space are the most important: truncating is solving at a lower rank.
    fewer = FACTORISATIONS["ngc"].function(ws, [stats] * 3, 2)
    truncated = [q[:, :2] @ states.input_states[:, :2].T for q in states.output_states]
    np.testing.assert_allclose(np.concatenate(truncated), np.concatenate(fewer.weights()), atol=1e-7)


def test_alternating_least_squares_falls_and_beats_the_pooled_start():
    ws = [weight(6, 9, 1), weight(5, 7, 2), weight(4, 9, 3)]  # one member is narrower
    stats = [statistics(inputs(9, seed=1)), statistics(inputs(7, seed=2)), statistics(inputs(9, seed=3))]
    start = FACTORISATIONS["basis_sharing"].function(ws, stats, 4)

    def total(states):
        parts = zip(states.weights(), ws, stats, strict=True)
        return sum(loss(a[:, : w.shape[1]], w, s.second_moment) for a, w, s in parts)

    moments = [s.second_moment for s in stats]
    losses = [total(alternate(ws, moments, start, sweeps)) for sweeps in (0, 1, 2, 4, 8)]
    assert losses[0] < total(start)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(losses))
    assert total(FACTORISATIONS["ngc"].function(ws, stats, 4)) == pytest.approx(losses[3], rel=0.02)


def test_alternating_least_squares_minimises_the_two_sided_loss():
    ws = [weight(6, 9, 1), weight(11, 9, 2)]
    stats = [statistics(inputs(9, seed=1)), statistics(inputs(9, seed=2))]
    measured, moments = zip(*[gradients(len(w), seed=len(w), weight=w) for w in ws], strict=True)
    stats = [dataclasses.replace(s, gradients=g) for s, g in zip(stats, measured, strict=True)]
    roots = [np.linalg.cholesky(g + DAMPING * np.diag(g).mean() * np.eye(len(g))).T for g in moments]

    def total(states):
        parts = zip(states.weights(), ws, stats, roots, strict=True)
        return sum(loss(root @ a, root @ w, s.second_moment) for a, w, s, root in parts)

    full = FACTORISATIONS["ngc"].function(ws, stats, 9)
    everything = sum(loss(root @ w, 0 * w, s.second_moment) for w, s, root in zip(ws, stats, roots, strict=True))
    assert total(full) < 1e-6 * everything
    for rank in (2, 5):
        # The energies of the pooled states are those of the true loss.
        pooled = full.truncated(rank)
        outputs = [best_outputs(w, s.second_moment, pooled.input_states) for w, s in zip(ws, stats, strict=True)]
        at_pooled = total(dataclasses.replace(pooled, output_states=tuple(outputs)))
        assert at_pooled == pytest.approx(everything - full.energies[:rank].sum(), rel=1e-5)
        fitted = FACTORISATIONS["ngc"].function(ws, stats, rank)
        assert total(fitted) < at_pooled
        converged = FACTORISATIONS["ngc"].function(ws, stats, rank, sweeps=200)
        generator = np.random.default_rng(0)
        for _ in range(20):
            moved = converged.input_states + 1e-4 * generator.standard_normal(converged.input_states.shape)
            assert total(dataclasses.replace(converged, input_states=moved)) >= total(converged) * (1 - 1e-9)


@pytest.mark.parametrize("widths", [(9, 9), (9, 7), (7, 9)])
def test_two_members_are_solved_as_many_are(widths):
    """The closed form for two and the iteration for more find the same, a third member that weighs nothing or none."""
    ws = [weight(6, widths[0], 1), weight(5, widths[1], 2)]
    moments = [statistics(inputs(width, seed=width + i)).second_moment for i, width in enumerate(widths)]
    start = pooled_states(ws, moments, [w.T @ w for w in ws]).truncated(4)
    nothing = weight(3, 9, 3)
    for sweeps in (1, 3):
        two = alternate(ws, moments, start, sweeps)
        three = alternate(
            [*ws, nothing], [*moments, 1e-12 * np.eye(9)], start, sweeps, [*(w.T @ w for w in ws), np.zeros((9, 9))]
        )
        for ours, theirs, width in zip(two.weights(), three.weights()[:2], widths, strict=True):
            np.testing.assert_allclose(ours[:, :width], theirs[:, :width], atol=1e-4)


def test_square_root_of_an_indefinite_matrix_is_finite():
    c = np.diag([1.0, 1e-3, -1e-6])
    root = square_root(c)
    assert np.isfinite(root).all()
    np.testing.assert_allclose(root @ root.T, np.diag([1.0, 1e-3, 0.0]), atol=2e-6)


def test_fwsvd_says_that_it_needs_gradients():
    with pytest.raises(UsageError, match="gradients"):
        FACTORISATIONS["fwsvd"].function([weight(3, 4)], [statistics(inputs(4))], 2)


@pytest.mark.parametrize("name", FACTORISATIONS)
def test_every_method_returns_states_of_the_right_shape(name):
    stats = [statistics(inputs(8, seed=seed), np.ones(8)) for seed in range(2)]
    states = FACTORISATIONS[name].function([weight(5, 8), weight(3, 8)], stats, 4)
    assert states.input_states.shape == (8, 4)
    assert [q.shape for q in states.output_states] == [(5, 4), (3, 4)]
    assert states.input_states.dtype == np.float64


def members(same_input):
    """Three members with all statistics: of one input, or of one each."""
    generator = np.random.default_rng(0)
    xs = [inputs(8)] * 3 if same_input else [inputs(8, seed=seed) for seed in range(3)]
    ws = [weight(outputs, 8, outputs) for outputs in (7, 3, 5)]
    measured = []
    for w, x in zip(ws, xs, strict=True):
        g = generator.standard_normal((50, len(w)))
        metric = g.T @ g / 50
        gradients = OutputGradients(50, np.diag(metric).copy(), metric)
        measured.append(dataclasses.replace(statistics(x, np.linspace(1, 2, 8)), gradients=gradients))
    return ws, measured


@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_a_copy_of_the_arguments_gives_the_same_result(name, same_input):
    ws, measured = members(same_input)
    once, again = (
        FACTORISATIONS[name].function(*given, 4) for given in ((ws, measured), copy.deepcopy((ws, measured)))
    )
    for one, other in zip(once.weights(), again.weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_the_order_of_the_members_does_not_matter(name, same_input):
    ws, measured = members(same_input)
    order = [2, 0, 1]
    once = FACTORISATIONS[name].function(ws, measured, 4).weights()
    permuted = FACTORISATIONS[name].function([ws[i] for i in order], [measured[i] for i in order], 4).weights()
    for place, index in enumerate(order):
        np.testing.assert_allclose(permuted[place], once[index], atol=1e-6)
