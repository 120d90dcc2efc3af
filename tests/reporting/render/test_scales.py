"""Axes are labelled with round numbers inside them."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from ngc_jax.reporting.render.scales import ASINH_WIDTH, padded_range, scale_ticks, scaled, ticks

finite = st.floats(-1e6, 1e6)


@hypothesis.given(st.lists(finite, max_size=5))
def test_linear_ticks_are_inside_evenly_spaced_and_few(values):
    low, high = padded_range(values, 0.05)
    hypothesis.assume(high - low > 1e-6 * max(abs(low), abs(high)))
    found = ticks(low, high)
    air = 1e-6 * (high - low)
    assert 2 <= len(found) <= 8
    assert low - air <= found[0] < found[-1] <= high + air
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert max(steps) - min(steps) < 1e-6 * max(steps) + 1e-9 * max(map(abs, found))


@pytest.mark.parametrize(("low", "high"), [(10, 900), (13.1, 36), (14.0, 14.6), (1e-3, 5e4)])
def test_log_ticks_are_inside(low, high):
    found = scale_ticks("log", scaled(low, "log"), scaled(high, "log"))
    assert 2 <= len(found) <= 10
    assert low <= found[0] < found[-1] <= high


def test_the_asinh_scale_is_odd_linear_near_zero_and_logarithmic_far_away():
    assert scaled(-0.3, "asinh") == -scaled(0.3, "asinh")
    assert scaled(1e-4, "asinh") == pytest.approx(1e-4 / ASINH_WIDTH, rel=1e-5)
    assert scaled(100, "asinh") - scaled(10, "asinh") == pytest.approx(2.302585, abs=1e-4)
    found = scale_ticks("asinh", scaled(-0.5, "asinh"), scaled(2.2, "asinh"))
    assert 0.0 in found
    assert {-0.1, 0.1, 1.0} <= {round(tick, 9) for tick in found}
    assert min(found) >= -0.5
    assert max(found) <= 2.2
