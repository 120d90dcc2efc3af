import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.planning.allocate import DENSE, Curve, allocate, rank_curve


def taken(cells, choices):
    """The curve of every group of the chosen ways, and the index into it."""
    for cell, (way, indices) in zip(cells, choices, strict=True):
        yield from zip(cell[way], indices, strict=True)


def stored(cells, choices):
    return sum(int(curve.parameters[index]) for curve, index in taken(cells, choices))


def loss(cells, choices):
    return sum(float(curve.losses[index]) for curve, index in taken(cells, choices))


def options(cell):
    """Every (parameters, loss) that a cell can have."""
    for way in cell:
        for picked in itertools.product(*(range(len(curve.ranks)) for curve in way)):
            pairs = [(curve.parameters[i], curve.losses[i]) for curve, i in zip(way, picked, strict=True)]
            yield tuple(np.sum(pairs, axis=0))


def optimum(cells, budget):
    """The least loss within the budget, by looking at every combination."""
    best = {0.0: 0.0}
    for cell in cells:
        new = {}
        for (used, so_far), (cost, value) in itertools.product(best.items(), list(options(cell))):
            new[used + cost] = min(new.get(used + cost, np.inf), so_far + value)
        best = new
    return min(value for used, value in best.items() if used <= budget)


def curve_of(losses, parameters):
    return Curve(np.append(np.arange(1, len(losses)), DENSE), np.asarray(losses, float), np.asarray(parameters))


def random_cells(rng, ties):
    """Small cells of falling losses and rising costs, which are not convex; `ties` gives many equal numbers."""

    def curve(total):
        size = rng.integers(1, 5)
        fall = rng.integers(0, 3, size) if ties else rng.exponential(size=size)
        costs = np.cumsum(rng.integers(1, 3 if ties else 30, size))
        return curve_of(np.cumsum(fall[::-1])[::-1] - fall[-1], costs + total)

    def cell():
        return [[curve(rng.integers(3)) for _ in range(rng.integers(1, 3))] for _ in range(rng.integers(1, 3))]

    return [cell() for _ in range(rng.integers(1, 5))]


def least(cells):
    return int(sum(min(cost for cost, _ in options(cell)) for cell in cells))


def most(cells):
    return int(sum(max(cost for cost, _ in options(cell)) for cell in cells))


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_within_budget_and_at_most_one_cell_from_the_optimum(seed, share):
    """The optimum over the hulls has one fractional cell at most: what it could gain bounds what is lost."""
    cells = random_cells(np.random.default_rng(seed), ties=False)
    budget = least(cells) + int(share * (most(cells) - least(cells)))
    choices = allocate(cells, budget)
    assert stored(cells, choices) <= budget
    best, found = optimum(cells, budget), loss(cells, choices)
    widest = max(max(v for _, v in options(cell)) - min(v for _, v in options(cell)) for cell in cells)
    assert best - 1e-9 <= found <= best + widest + 1e-9


def test_the_gap_to_the_optimum_is_small_on_average():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(60):
        cells = random_cells(rng, ties=False)
        budget = int(rng.integers(least(cells), most(cells) + 1))
        worst = sum(max(v for _, v in options(cell)) for cell in cells)
        gaps.append((loss(cells, allocate(cells, budget)) - optimum(cells, budget)) / max(worst, 1e-9))
    assert np.mean(gaps) < 0.02


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6), st.booleans())
def test_the_optimum_itself_for_convex_curves_of_equal_steps(seed, groups, size, ties):
    rng = np.random.default_rng(seed)
    cells = []
    for _ in range(groups):
        energies = np.sort(rng.integers(0, 4, size).astype(float) if ties else rng.exponential(size=size))[::-1]
        losses = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        cells.append([[curve_of(losses, 7 * np.arange(1, size + 2))]])
    for budget in range(7 * groups, 7 * groups * (size + 1) + 1, 5):
        assert loss(cells, allocate(cells, budget)) == pytest.approx(optimum(cells, budget), abs=1e-9)


@given(st.integers(0, 10**6), st.booleans())
def test_a_larger_budget_never_gives_a_larger_loss(seed, ties):
    cells = random_cells(np.random.default_rng(seed), ties)
    budgets = np.unique(np.linspace(least(cells), most(cells), 12).astype(int))
    losses = [loss(cells, allocate(cells, int(budget))) for budget in budgets]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))
    assert np.isfinite(losses).all()
    assert losses[-1] == pytest.approx(sum(min(v for _, v in options(cell)) for cell in cells))


@given(st.integers(0, 10**6))
def test_the_scale_of_the_losses_does_not_matter(seed):
    """Losses of a real model may be tiny or huge; parameters are counted in millions."""
    cells = random_cells(np.random.default_rng(seed), ties=False)
    budget = (least(cells) + most(cells)) // 2
    found = allocate(cells, budget)
    for scale in (2.0**-60, 2.0**60):
        scaled = [[[Curve(c.ranks, c.losses * scale, c.parameters) for c in way] for way in cell] for cell in cells]
        assert allocate(scaled, budget) == found


def test_a_curve_of_zeros_stores_the_least():
    cells = [[[curve_of([0.0, 0.0, 0.0], [3, 6, 9])]], [[curve_of([5.0, 1.0, 0.0], [3, 6, 9])]]]
    assert allocate(cells, 12) == [(0, (0,)), (0, (2,))]


def test_the_way_that_is_cheaper_at_the_budget_is_taken():
    private = [curve_of([4.0, 0.5, 0.0], [10, 20, 40]), curve_of([4.0, 0.5, 0.0], [10, 20, 40])]
    shared = [curve_of([3.0, 2.0, 0.0], [15, 30, 80])]
    cells = [[private, shared]]
    for budget, way, expected in ((15, 1, 3.0), (40, 0, 1.0), (80, 0, 0.0)):
        (choice,) = allocate(cells, budget)
        assert choice[0] == way
        assert loss(cells, [choice]) == expected
    with pytest.raises(UsageError, match="14 parameters, and these groups store at least 15"):
        allocate(cells, 14)


def test_a_budget_below_the_least_is_refused():
    energies = np.ones(6)
    cells = [[[rank_curve(energies, 10, 6, 60, gauge=True)]]] * 3
    assert stored(cells, allocate(cells, 45)) == 45
    with pytest.raises(UsageError, match=r"44 parameters.*45.*raise it"):
        allocate(cells, 44)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9), st.integers(1, 9), st.booleans())
def test_rank_curve_counts_what_a_group_stores(outputs, inputs, biases, multiple, gauge):
    energies = np.random.default_rng(outputs).exponential(size=min(outputs, inputs)) - 0.2
    dense = outputs * inputs + biases
    curve = rank_curve(energies, outputs, inputs, dense, gauge=gauge, biases=biases, multiple=multiple)
    # Staying dense is always open, is exact, and is the only choice that costs so much.
    assert (curve.ranks[-1], curve.losses[-1], curve.parameters[-1]) == (DENSE, 0.0, dense)
    assert (curve.parameters[:-1] < dense).all()
    ranks = [r for r in range(1, len(energies) + 1) if r % multiple == 0]
    costs = {r: r * (outputs + inputs - (r if gauge else 0)) + biases for r in ranks}
    assert curve.ranks[:-1].tolist() == [r for r in ranks if costs[r] < dense]
    for rank, value, cost in zip(curve.ranks[:-1], curve.losses, curve.parameters, strict=False):
        assert cost == costs[rank]
        assert value == pytest.approx(np.maximum(energies, 0)[rank:].sum(), abs=1e-9)
    assert (np.diff(curve.losses) < 0).all() or energies.max() <= 0
    assert (np.diff(curve.parameters) > 0).all()


def test_keep_one_leaves_everything_dense():
    rng = np.random.default_rng(1)
    shapes = [(8, 20, 160), (20, 8, 165), (13, 13, 169)]
    energies = [rng.exponential(size=min(m, n)) for m, n, _ in shapes]
    # Directions that calibration never reached have no energy, or rounding noise; the budget is available nevertheless.
    energies[0][3:], energies[1][5:] = 0.0, -1e-17
    for gauge in (False, True):
        curves = [
            rank_curve(e, m, n, dense, gauge=gauge, biases=dense - m * n)
            for e, (m, n, dense) in zip(energies, shapes, strict=True)
        ]
        cells = [[[curve]] for curve in curves]
        choices = allocate(cells, sum(dense for _, _, dense in shapes))
        assert [int(curve.ranks[i]) for curve, (_, (i,)) in zip(curves, choices, strict=True)] == [DENSE] * 3


def test_rank_multiples_are_respected_by_what_is_left_of_the_budget_too():
    rng = np.random.default_rng(2)
    curves = [rank_curve(np.sort(rng.exponential(size=40))[::-1], 64, 40, 2560, gauge=True, multiple=8)] * 5
    curves.append(rank_curve(np.ones(5), 5, 7, 35, gauge=True, multiple=8))  # too small for the multiple: stays dense
    choices = allocate([[[curve]] for curve in curves], 7000)
    ranks = [int(curve.ranks[i]) for curve, (_, (i,)) in zip(curves, choices, strict=True)]
    assert ranks[-1] == DENSE
    assert all(rank % 8 == 0 for rank in ranks)
    assert stored([[[curve]] for curve in curves], choices) <= 7000


def test_many_groups_of_many_ranks():
    rng = np.random.default_rng(3)
    curves = [
        rank_curve(np.sort(rng.lognormal(rng.normal(), 2.0, 400))[::-1], 1000, 400, 400_000, gauge=True)
        for _ in range(300)
    ]
    cells = [[[curve]] for curve in curves]
    dense = 400_000 * len(curves)
    previous = np.inf
    for keep in (0.05, 0.5, 0.95):
        choices = allocate(cells, int(keep * dense))
        assert 0.999 * keep * dense < stored(cells, choices) <= keep * dense
        found = loss(cells, choices)
        assert np.isfinite(found)
        assert found < previous
        previous = found
