"""The same charts with matplotlib."""

import io

import numpy as np
import pytest

from ngc_jax.reporting import blocks, texts, views
from ngc_jax.reporting.render.plots import draw, draw_beside
from tests.models.compact import compact_model
from tests.reporting.setting import comparison, metrics, stability


def drawn(chart):
    """The figure, really rendered: fonts, ticks and all."""
    figure = draw(chart)
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


@pytest.mark.parametrize(
    "chart",
    [
        views.growth(stability()),
        views.growth(stability("sequence")),
        views.pareto(comparison(), [(0.6, "a $ sign")]),
        views.training(metrics())[0],
        views.spectra(stability())[0],
    ],
    ids=lambda chart: chart.title,
)
def test_lines_are_those_of_the_chart(chart):
    axes = drawn(chart).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == len(chart.series[0].x) or line.get_label()]
    by_label = {line.get_label(): line for line in lines}
    for one in chart.series:
        line = by_label[one.name.replace("$", r"\$")]
        np.testing.assert_allclose(line.get_xdata(), one.x)
        np.testing.assert_allclose(line.get_ydata(), [np.nan if y is None else y for y in one.y])


@pytest.mark.parametrize("along", ["depth", "sequence"])
def test_growth_and_metric_stand_side_by_side(along):
    results = stability(along, texts=("a $5 text of tokens",) * 10)
    figure = draw_beside([views.growth(results), views.metric_over_text(results)], "a $ title")
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    _, right = figure.axes
    found = right.get_lines()[0].get_xydata()
    prompt = results["prompts"][0]
    if along == "depth":
        np.testing.assert_allclose(found, list(enumerate(prompt["tokens_metric"]))[1:])
    else:
        np.testing.assert_allclose(found, list(zip(prompt["ends"], prompt["segments"], strict=True)))
    assert figure.get_supxlabel() == "2 more prompts are not drawn."


def test_what_is_left_out_is_said_below():
    assert "fwsvd at 0.8" in drawn(views.pareto(comparison())).get_supxlabel()


def test_bars_have_their_lengths():
    (chart,) = views.other_variants(comparison())
    (axes,) = drawn(chart).axes
    assert [bar.get_width() for bar in axes.patches] == list(chart.panels[0][1])


def test_the_map_has_a_square_for_every_block():
    model = compact_model()
    chart = blocks.kept_map(model.config, model.plan, "tiny")
    axes = drawn(chart).axes[0]
    assert len(axes.patches) == len(chart.cells)
    shown = [text.get_text() for text in axes.texts if text.get_text()]
    assert shown == [cell.short for cell in chart.cells if cell.value is not None]


def test_the_text_is_all_there_for_each_measure():
    (text, other) = texts.texts(stability(texts=("word " * 40, "a $5 line\nand one more")), (0.1, 1.0))
    for one in (text, other):
        figure = drawn(one)
        for axes in figure.axes[:2]:
            shown = "".join(part.get_text() for part in axes.texts).replace(r"\$", "$").replace("↵", "\n")
            assert shown == "".join(one.pieces)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="not a chart"):
        draw({})
