"""Colours are legible and distinguishable, in both themes; the references are those of WCAG 2 and of Ottosson."""

import numpy as np
import pytest

from ngc_jax.reporting.render.colours import BINS, INKS, SERIES, THEMES, contrast, ramp, text_on, variables


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#ff0000", "#ffffff") == pytest.approx(4.0, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
def test_text_is_legible_on_every_colour(theme):
    ink = INKS[theme]
    for name in ("stability", "potential"):
        assert min(contrast(ink["ink"], colour) for colour in ramp(name, theme)) >= 4.5
    for name in ("kept", "loss"):
        assert min(contrast(text_on(colour), colour) for colour in ramp(name, theme)) >= 4.5
    for place in ("card", "paper", "well"):
        assert contrast(ink["ink"], ink[place]) >= 7
        assert contrast(ink["muted"], ink[place]) >= 4.5
        assert contrast(ink["accent"], ink[place]) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
def test_lines_stand_out(theme):
    assert min(contrast(colour, INKS[theme]["card"]) for colour in (*SERIES[theme], INKS[theme]["ours"])) >= 3


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", list(BINS))
def test_ramps_grow_lighter_or_darker_all_the_way(name, theme):
    colours = ramp(name, theme)
    assert len(set(colours)) == BINS[name]
    steps = np.diff([contrast(colour, "#000000") for colour in colours])
    halves = [steps[:5], steps[5:]] if name == "stability" else [steps]
    for half in halves:
        assert (half > 0).all() or (half < 0).all()


def test_ramps_end_in_their_anchors():
    assert ramp("kept", "light")[0] == "#e2eef3"
    assert ramp("kept", "light")[-1] == "#0a3a58"
    assert ramp("stability", "dark")[5] == "#222932"


def test_both_themes_have_the_same_variables():
    assert variables("light").keys() == variables("dark").keys()
