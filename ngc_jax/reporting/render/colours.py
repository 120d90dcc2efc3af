"""Colours of reports, for light and dark: one source for the pages and for matplotlib.

Ramps are interpolated in OKLab (Ottosson 2020), in which equal steps look equal. Blue to orange and single hues can be
distinguished with red-green colour blindness, and the lightness of every ramp is monotone on either side.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")

# Colours of a page's elements. `ours` is the highlighted series, `s0` to `s7` are the others.
INKS: dict[Theme, dict[str, str]] = {
    "light": {
        "paper": "#f5f4ef",
        "card": "#ffffff",
        "ink": "#18202b",
        "muted": "#535d6b",
        "rule": "#dcdfe3",
        "well": "#f4f3f0",
        "accent": "#0b6182",
        "link": "#18202b",
        "ours": "#b81420",
    },
    "dark": {
        "paper": "#10141a",
        "card": "#181e26",
        "ink": "#e8edf3",
        "muted": "#a7b1be",
        "rule": "#323b47",
        "well": "#222932",
        "accent": "#83cbe4",
        "link": "#f2f5f8",
        "ours": "#ff7b78",
    },
}
SERIES: dict[Theme, tuple[str, ...]] = {
    "light": ("#1c66a8", "#ad5500", "#08795a", "#7f45a8", "#6d5f14", "#b03a6c", "#2f7380", "#5f6875"),
    "dark": ("#76baf3", "#f2a654", "#55d3a8", "#cba3ee", "#d9c75f", "#f392b9", "#7ecbd5", "#b1bac6"),
}
_ANCHORS: dict[Theme, dict[str, tuple[str, ...]]] = {
    "light": {
        "kept": ("#e2eef3", "#86b8cb", "#23749a", "#0a3a58"),
        "loss": ("#fbf1e1", "#f2b76e", "#c95b2d", "#721c19"),
        "stability": ("#64aaec", "#c3ddf5", "#f4f3f0", "#fbd2a6", "#f39440"),
        "potential": ("#f4f3f0", "#d9caf0", "#b592e6"),
    },
    "dark": {
        "kept": ("#22303a", "#265f7a", "#58a8c6", "#cdf0fa"),
        "loss": ("#2f2620", "#7d3d23", "#da7d3f", "#ffdfa8"),
        "stability": ("#1d62a6", "#23435f", "#222932", "#5b4425", "#9b530c"),
        "potential": ("#222932", "#463a68", "#7450b4"),
    },
}
# Colours of each ramp. An odd number of colours has a middle one, for 0.
BINS = {"kept": 10, "loss": 10, "stability": 11, "potential": 8}

# OKLab: linear sRGB to cone responses, and their cube roots to lightness and two opponent colours.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OPPONENT = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def ramp(name: str, theme: Theme) -> tuple[str, ...]:
    """The colours of a ramp, from lowest to highest, as #rrggbb."""
    anchors = np.array([_to_oklab(_linear(colour)) for colour in _ANCHORS[theme][name]])
    places = np.linspace(0, len(anchors) - 1, BINS[name])
    mixed = np.stack([np.interp(places, range(len(anchors)), anchors[:, axis]) for axis in range(3)], axis=1)
    return tuple(_hex(_from_oklab(colour)) for colour in mixed)


def colour_bin(name: str, value: float | None, lowest: float, highest: float) -> int | None:
    """The index of a value in a ramp, ends included; None for no value."""
    if value is None or math.isnan(value):
        return None
    share = (value - lowest) / (highest - lowest)
    return int(min(max(share * BINS[name], 0), BINS[name] - 1))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def text_on(background: str) -> str:
    """Black or white, whichever is more legible there: one of them has a contrast of 4.5 on every colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, background))


def variables(theme: Theme) -> dict[str, str]:
    """All colours of a theme as CSS variables without the leading dashes."""
    found = dict(INKS[theme])
    found |= {f"s{place}": colour for place, colour in enumerate(SERIES[theme])}
    for name in BINS:
        for place, colour in enumerate(ramp(name, theme)):
            found[f"{name}-{place}"] = colour
            if name in ("kept", "loss"):
                found[f"{name}-{place}-ink"] = text_on(colour)
    return found


def _linear(colour: str) -> np.ndarray:
    """(3,) linear RGB of #rrggbb."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _hex(linear: np.ndarray) -> str:
    linear = np.clip(linear, 0, 1)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * value):02x}" for value in values.tolist())


def _to_oklab(linear: np.ndarray) -> np.ndarray:
    return _OPPONENT @ np.cbrt(_CONES @ linear)


def _from_oklab(lab: np.ndarray) -> np.ndarray:
    return np.linalg.solve(_CONES, np.linalg.solve(_OPPONENT, lab) ** 3)


def _luminance(colour: str) -> float:
    return float(np.dot((0.2126, 0.7152, 0.0722), _linear(colour)))
