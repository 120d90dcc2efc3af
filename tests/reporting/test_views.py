"""Charts from results: every number against the JSON it came from."""

import math

import numpy as np
import pytest

from ngc_jax.reporting import texts, views
from ngc_jax.reporting.charts import nice_limit, number, percent, signed
from ngc_jax.reporting.render.colours import colour_bin
from tests.reporting.setting import comparison, metrics, stability


def test_pareto_leaves_broken_models_out_and_names_them():
    chart = views.pareto(comparison(), [(0.6, "mine")])
    lines = {one.name: one for one in chart.series}
    assert lines["ngc"].x == (0.5, 0.8)
    assert lines["ngc"].y == (20.0, 12.0)
    assert lines["ngc"].style == -1
    assert lines["svd"].y == (30.0,)
    assert "fwsvd" not in lines
    assert "svd at 0.5" in chart.note
    assert "fwsvd at 0.8" in chart.note
    assert chart.y_scale == "log"
    assert chart.marks == ((0.6, "mine"),)
    assert views.front(comparison()) == ["ngc"]


def test_other_variants_are_measured_from_the_dense_model():
    (levers,) = views.other_variants(comparison())
    assert levers.names == ("svd + gauge",)
    assert levers.panels == (("keep 0.8", (pytest.approx(math.log(2.5)),)),)


def test_growth_along_depth_is_the_median_over_tokens_but_the_first():
    results = stability()
    chart = views.growth(results)
    for one, prompt in zip(chart.series, results["prompts"], strict=True):
        np.testing.assert_allclose(one.y, np.median(prompt["growth"][1:], axis=0))
        assert all(low <= middle <= high for low, middle, high in zip(one.low, one.y, one.high, strict=True))


def test_growth_over_a_segment_begins_at_nothing():
    results = stability("sequence")
    (first, _) = views.growth(results).series
    assert first.y[0] == 0
    np.testing.assert_allclose(first.y[1:], np.mean(results["prompts"][0]["growth"], axis=0))


def test_spectra_have_a_line_for_every_direction_on_one_scale():
    results = stability()
    charts = views.spectra(results)
    assert len(charts) == 2
    assert {chart.y_range for chart in charts} == {charts[0].y_range}
    for chart, prompt in zip(charts, results["prompts"], strict=True):
        assert [list(one.y) for one in chart.series] == np.array(prompt["layer_exponents"], object).T.tolist()
        assert chart.series[1].y[0] is None  # a direction that was lost


def test_more_prompts_than_can_be_drawn_are_counted():
    results = stability(texts=tuple(f"prompt {index}" for index in range(11)))
    assert len(views.growth(results).series) == 8
    assert "3 more" in views.growth(results).note


def test_of_two_lines_for_one_step_the_later_holds():
    loss, perplexity = views.training(metrics())
    assert [one.name for one in loss.series] == ["loss"]  # the divergence is all of it
    assert (loss.series[0].x, loss.series[0].y) == ((1, 2), (3.0, 2.0))
    assert (perplexity.series[0].x, perplexity.series[0].y) == ((0, 2), (40.0, 30.0))


def test_tokens_carry_their_numbers_and_the_first_no_colour():
    results = stability()
    limits = texts.colour_limits([results])
    for text, prompt in zip(texts.texts(results, limits), results["prompts"], strict=True):
        assert "".join(text.pieces) == prompt["text"]
        rates, shares = text.measures
        assert rates.values == (None, *prompt["tokens_metric"][1:])
        assert shares.values == (None, *prompt["tokens_potential_share"][1:])
        assert rates.lowest == -rates.highest == -limits[0]
        for told, rate, share in zip(
            text.descriptions, prompt["tokens_metric"], prompt["tokens_potential_share"], strict=True
        ):
            assert signed(rate) in told
            assert ("grows" if rate > 0 else "decays") in told
            assert percent(share) in told
        assert "not counted" in text.descriptions[0]
        assert len(text.rows) == len(prompt["tokens"])


def test_segments_are_the_text_in_order():
    results = stability("sequence", ("a text of 22 letters..",))
    (text,) = texts.texts(results, (1.0, 1.0))
    assert text.pieces == ("a te", "xt o", "f 22", " let", "ters", "..")
    assert text.measures[0].values == (None, *results["prompts"][0]["segments"], None)
    assert "nothing is measured" in text.descriptions[0]
    assert "too few" in text.descriptions[-1]
    rate = results["prompts"][0]["segments"][0]
    assert percent(math.exp(4 * rate), 0) in text.descriptions[1]


def test_zero_is_the_middle_colour_and_outliers_the_last():
    assert colour_bin("stability", 0.0, -0.1, 0.1) == 5
    assert colour_bin("stability", -9.0, -0.1, 0.1) == 0
    assert colour_bin("stability", 9.0, -0.1, 0.1) == 10
    assert colour_bin("stability", math.nan, -0.1, 0.1) is None
    assert colour_bin("kept", 1.0, 0.0, 1.0) == 9


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.123456, "0.1235"),
        (-3.0, "−3"),
        (1234567.0, "1,234,567"),
        (1.5e-7, "1.5e−07"),
        (12345.6, "12,346"),
        (None, "–"),
    ],
)
def test_numbers_are_written_for_people(value, told):
    assert number(value) == told


def test_a_limit_is_round_and_exceeded_by_few():
    values = [0.001 * index for index in range(1000)]
    assert nice_limit(values) == 1.0
    assert nice_limit([*values[:970], *[50.0] * 30]) == 1.0  # few outliers do not stretch the scale
    assert nice_limit([*values[:800], *[50.0] * 200]) == 50.0
    assert nice_limit([-0.11]) == pytest.approx(0.12)
    assert nice_limit([]) == 1.0
