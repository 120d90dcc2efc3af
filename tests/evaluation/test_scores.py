"""Intervals and pass@k against closed forms, scipy, and counting all subsets."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ngc_jax.evaluation.scores import Sum, bootstrap_interval, pass_at_k, wilson_interval


def test_intervals_of_proportions_are_wilsons():
    for successes, count in ((0, 5), (5, 5), (81, 263), (1, 2)):
        expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, "wilson")
        expected = pytest.approx((expected.low, expected.high), abs=1e-6)
        assert wilson_interval(successes, count) == expected
        assert Sum((1.0,) * successes + (0.0,) * (count - successes)).interval == expected


def test_the_bootstrap_agrees_with_the_normal_approximation_and_is_repeatable():
    values = np.random.default_rng(0).choice([0.0, 0.25, 0.5, 1.0], 400).tolist()
    low, high = Sum(tuple(values)).interval
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.1 * half)
    assert bootstrap_interval(values, (0.0, 1.0)) == (low, high)
    assert bootstrap_interval([0.5], (0.0, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 1), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, correct):
    right = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, samples + 1)
