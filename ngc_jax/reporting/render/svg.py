"""Charts as inline SVG: colours are classes, so that they follow a page's theme, and all text is escaped.

Coordinates are in pixels of the picture's natural size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

from markupsafe import Markup

from ngc_jax.reporting.charts import Bars, Lines, Measure, Number, Series, number
from ngc_jax.reporting.render.colours import colour_bin
from ngc_jax.reporting.render.scales import padded_range, scale_ticks, scaled, ticks

_WIDTH, _HEIGHT = 500, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 18, 46
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 4", "6 2 1 2")
_MARKERS = 5


def lines(chart: Lines, key: str) -> Markup:
    """A line chart; `key` is unique on the page."""
    marked = any(one.markers for one in chart.series)
    x_low, x_high = padded_range(
        [x for one in chart.series for x in one.x] + [x for x, _ in chart.marks], 0.04 if marked else 0.0
    )
    edges = [value for one in chart.series for part in (one.y, one.low or (), one.high or ()) for value in part]
    values = [value for value in edges if value is not None and math.isfinite(value)]
    values = [*(chart.y_range or values), *(value for value, _ in chart.rules)]
    y_low, y_high = padded_range([scaled(value, chart.y_scale) for value in values], 0.06)

    def place_x(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def place_y(y: float) -> float:
        y = min(max(scaled(y, chart.y_scale), y_low), y_high)
        return round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    y_ticks = scale_ticks(chart.y_scale, y_low, y_high)
    parts = [_axes(chart, [(place_x(t), t) for t in ticks(x_low, x_high, 7)], [(place_y(t), t) for t in y_ticks])]
    for x, label in chart.marks:
        parts.append(_line(place_x(x), _TOP, place_x(x), _HEIGHT - _BOTTOM, "mark"))
        end = place_x(x) > _WIDTH * 0.7
        anchor, shift = ("end", -5) if end else ("start", 5)
        parts.append(text(place_x(x) + shift, _TOP + 10, label, "label", anchor))
    for y, label in chart.rules:
        parts.append(_line(_LEFT, place_y(y), _WIDTH - _RIGHT, place_y(y), "zero" if not label else "mark"))
        if label:
            parts.append(text(_WIDTH - _RIGHT, place_y(y) - 5, label, "label", "end"))
    # The strongest and the highlighted line are drawn last, on top.
    for one in sorted(chart.series, key=lambda one: (one.style == -1, one.strength)):
        points = [(place_x(x), place_y(y)) for x, y in zip(one.x, one.y, strict=True) if _drawable(y)]
        parts.append(_band(one, place_x, place_y))
        parts.append(_path(points, one, dashed=len({other.style for other in chart.series}) > 1))
        if one.markers:
            parts += [marker(x, y, one.style) for x, y in points]
    parts.append(_strips(chart, place_x))
    return document(_WIDTH, _HEIGHT, key, chart.title, chart.description, parts)


def swatch(one: Series) -> Markup:
    """A line's symbol in the legend."""
    parts = [_path([(1, 7), (27, 7)], one)]
    if one.markers:
        parts.append(marker(14, 7, one.style))
    return Markup('<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def bars(chart: Bars, key: str) -> Markup:
    """Horizontal bars in adjacent panels."""
    step, top, left = 24, 26, 150
    width = max(220, 420 // len(chart.panels))
    height = top + step * len(chart.names) + 34
    found = [value for _, values in chart.panels for value in values if value is not None]
    longest = min(max([*found, 1e-9]), chart.highest)
    parts = [text(left - 8, top + step * i + 16, _cut(name, 22), "tick", "end") for i, name in enumerate(chart.names)]
    for place, (title, values) in enumerate(chart.panels):
        x = left + place * width
        parts.append(text(x, top - 8, title, "label strong", "start"))
        parts.append(_line(x, top, x, top + step * len(values), "zero"))
        for row, value in enumerate(values):
            if value is None:
                continue
            length = round(max(min(value, longest), 0) / longest * (width - 78), 1)
            cut = value > chart.highest
            style = _style(chart.styles[row])
            parts.append(
                Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                    style, x, top + step * row + 4, max(length, 1), step - 8
                )
            )
            parts.append(
                text(x + length + 6, top + step * row + 16, "broken" if cut else number(value, 3), "tick", "start")
            )
    parts.append(text(left, height - 8, chart.x_label, "axis", "start"))
    return document(left + width * len(chart.panels), height, key, chart.title, chart.description, parts)


def token_bars(measure: Measure, key: str, title: str) -> Markup:
    """One bar for each token, up or down from 0; stretches to the available width."""
    count = len(measure.values)
    height, zero = 60, 30 if measure.diverges else 58
    reach = zero - 2
    parts = [Markup('<line class="zero" x1="0" x2="{}" y1="{}" y2="{}"/>').format(count * 10, zero, zero)]
    for index, value in enumerate(measure.values):
        place = colour_bin(measure.key, value, measure.lowest, measure.highest)
        if value is None or place is None:
            continue
        size = max(round(min(abs(value) / measure.highest, 1.0) * reach, 1), 0.5)
        y = zero - size if value > 0 else zero
        parts.append(
            Markup('<rect class="{}-{} strip" data-at="{}" x="{}" y="{}" width="9" height="{}"/>').format(
                measure.key, place, index, index * 10 + 0.5, round(y, 1), size
            )
        )
    what = f"{title}, token by token" + (": up grows, down decays" if measure.diverges else "")
    return Markup(
        '<svg class="tokenbars" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-labelledby="{}">'
        '<title id="{}">{}</title>{}</svg>'
    ).format(count * 10, height, f"{key}-t", f"{key}-t", what, Markup("").join(parts))


def marker(x: float, y: float, style: int) -> Markup:
    """A point; its shape distinguishes lines in addition to the colour."""
    shapes = (
        f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 4} {y - 4}h8v8h-8z",
        f"M{x} {y - 5}l5 9h-10z",
        f"M{x} {y + 5}l5 -9h-10z",
        f"M{x} {y - 5}l5 5l-5 5l-5 -5z",
    )
    star = f"M{x} {y - 8}l2.2 5.3l5.7 .4l-4.4 3.7l1.4 5.6l-4.9 -3l-4.9 3l1.4 -5.6l-4.4 -3.7l5.7 -.4z"
    path = star if style == -1 else shapes[style % _MARKERS]
    return Markup('<path class="marker {}" d="{}"/>').format(_style(style), path)


def document(
    width: float,
    height: float,
    key: str,
    title: str,
    description: str,
    parts: Iterable[Markup],
    role: str = "img",
    kind: str = "",
) -> Markup:
    """A whole picture with its title and description; `key` is unique on the page."""
    return Markup(
        '<svg class="chart {}" viewBox="0 0 {} {}" width="{}" height="{}" role="{}" aria-labelledby="{}" '
        'aria-describedby="{}"><title id="{}">{}</title><desc id="{}">{}</desc>{}</svg>'
    ).format(
        kind, width, height, width, height, role, f"{key}-t", f"{key}-d", f"{key}-t", title, f"{key}-d", description,
        Markup("").join(parts),
    )  # fmt: skip


def _axes(chart: Lines, x_ticks: list[tuple[float, float]], y_ticks: list[tuple[float, float]]) -> Markup:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [_line(_LEFT, y, right, y, "grid") for y, _ in y_ticks]
    parts += [text(_LEFT - 7, y + 4, number(value), "tick", "end") for y, value in y_ticks]
    parts += [_line(x, bottom, x, bottom + 4, "rule") for x, _ in x_ticks]
    parts += [text(x, bottom + 17, number(value), "tick", "middle") for x, value in x_ticks]
    parts.append(_line(_LEFT, bottom, right, bottom, "rule"))
    parts.append(text((_LEFT + right) / 2, _HEIGHT - 8, chart.x_label, "axis", "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        Markup('<text class="axis" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, chart.y_label
        )
    )
    return Markup("").join(parts)


def _strips(chart: Lines, place_x: Callable[[float], float]) -> Markup:
    """Invisible columns that show a pointer all values at an x."""
    places = sorted({x for one in chart.series for x in one.x})
    if len(places) > 400 or not places:
        return Markup("")
    spots = [place_x(x) for x in places]
    parts = []
    for index, x in enumerate(places):
        begin = _LEFT if index == 0 else (spots[index - 1] + spots[index]) / 2
        end = _WIDTH - _RIGHT if index == len(places) - 1 else (spots[index] + spots[index + 1]) / 2
        values = [f"{chart.x_label}: {number(x)}"]
        for one in chart.series:
            values += [
                f"{one.name}: {number(y)}" for at, y in zip(one.x, one.y, strict=True) if at == x and y is not None
            ]
        parts.append(
            Markup('<rect class="hit" x="{}" y="{}" width="{}" height="{}" data-tip="{}"/>').format(
                round(begin, 1), _TOP, round(max(end - begin, 1), 1), _HEIGHT - _TOP - _BOTTOM, "; ".join(values)
            )
        )
    return Markup("").join(parts)


def _band(one: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> Markup:
    if one.low is None or one.high is None:
        return Markup("")
    edges = [edge for edge in zip(one.x, one.low, one.high, strict=True) if all(map(math.isfinite, edge))]
    if not edges:
        return Markup("")
    there = [f"{place_x(x)} {place_y(high)}" for x, _, high in edges]
    back = [f"{place_x(x)} {place_y(low)}" for x, low, _ in edges]
    return Markup('<path class="band {}" d="M{}z"/>').format(_style(one.style), "L".join([*there, *back[::-1]]))


def _path(points: Sequence[tuple[float, float]], one: Series, *, dashed: bool = True) -> Markup:
    if len(points) < 2:
        return Markup("")
    faint = Markup(' stroke-opacity="{}"').format(round(one.strength, 2)) if one.strength < 1 else Markup("")
    dash = "" if one.style < 0 or one.markers or not dashed else _DASHES[one.style % len(_DASHES)]
    dashes = Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup("")
    return Markup('<path class="line {}"{}{} d="M{}"/>').format(
        _style(one.style), faint, dashes, "L".join(f"{x} {y}" for x, y in points)
    )


def _drawable(y: Number) -> TypeGuard[float]:
    """Whether there is a number, and it is finite (an infinite one is a lost direction)."""
    return y is not None and math.isfinite(y)


def _style(place: int) -> str:
    return "ours" if place < 0 else f"s{place % 8}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def text(x: float, y: float, content: str, kind: str, anchor: str) -> Markup:
    """A line of text."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, round(x, 1), round(y, 1), anchor, content
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
