"""The charts of a report with matplotlib, for notebooks: `draw(chart)` gives a figure.

    from ngc_jax.reporting.render.plots import draw
    from ngc_jax.reporting.views import growth
    draw(growth(json.load(open("runs/stability/stability.json"))))

The charts come from `views.py`, `texts.py` and `blocks.py`, like those of a page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ngc_jax.reporting.charts import ROLE_NAMES, Bars, BlockMap, Lines, Text, number
from ngc_jax.reporting.render.colours import INKS, SERIES, colour_bin, ramp, text_on
from ngc_jax.reporting.render.figures import as_text, new_figure
from ngc_jax.reporting.render.scales import ASINH_WIDTH, scale_ticks, scaled

_DASHES: Sequence[Any] = ("-", "--", ":", "-.", (0, (8, 3)), (0, (4, 2)), (0, (1, 3)), (0, (5, 2, 1, 2)))
_MARKERS = "osv^D"
_INK = INKS["light"]


@singledispatch
def draw(chart: Lines | Bars | BlockMap | Text) -> Figure:
    """A figure of a chart, with its title and description.

    Raises:
        TypeError: If it is not a chart.
    """
    raise TypeError(f"{type(chart).__name__} is not a chart; expected Lines, Bars, BlockMap or Text")


@draw.register
def _(chart: Lines) -> Figure:
    figure = new_figure(7.5, 4.8)
    _draw_lines(figure.subplots(), chart)
    return _noted(figure, chart.note)


def draw_beside(charts: Sequence[Lines], title: str) -> Figure:
    """One figure of several line charts side by side, under a common title."""
    figure = new_figure(5.0 * len(charts), 4.2)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_lines(axes, chart)
    figure.suptitle(as_text(title), fontsize=11)
    return _noted(figure, " ".join(filter(None, (chart.note for chart in charts))))


def _draw_lines(axes: Any, chart: Lines) -> None:
    dashed = len({one.style for one in chart.series}) > 1
    for one in chart.series:
        colour = _colour(one.style)
        plain = one.markers or not dashed or one.style < 0
        axes.plot(
            one.x,
            [float("nan") if y is None else y for y in one.y],
            color=colour,
            alpha=one.strength,
            linestyle="-" if plain else _DASHES[one.style % len(_DASHES)],
            linewidth=2.4 if one.style < 0 else 1.5,
            marker=None if not one.markers else "*" if one.style < 0 else _MARKERS[one.style % len(_MARKERS)],
            markersize=11 if one.style < 0 else 5,
            zorder=3 if one.style < 0 else 2,
            label=as_text(one.name),
        )
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.13, linewidth=0)
    for y, label in chart.rules:
        axes.axhline(y, color=_INK["muted"], linewidth=1, linestyle="--" if label else "-")
        axes.annotate(as_text(label), (0, y), (3, 3), ("axes fraction", "data"), "offset points", fontsize=8)
    for x, label in chart.marks:
        axes.axvline(x, color=_INK["muted"], linewidth=1, linestyle="--")
        axes.annotate(as_text(label), (x, 1), (3, -10), ("data", "axes fraction"), "offset points", fontsize=8)
    if chart.y_scale != "linear":
        axes.set_yscale(chart.y_scale, **({"linear_width": ASINH_WIDTH} if chart.y_scale == "asinh" else {}))
    if chart.y_range is not None and chart.y_range[0] < chart.y_range[1]:
        axes.set_ylim(*chart.y_range)
    if chart.y_scale != "linear":
        ends = [scaled(value, chart.y_scale) for value in axes.get_ylim()]
        at = scale_ticks(chart.y_scale, *ends)
        axes.set_yticks(at, [number(value) for value in at])
        axes.minorticks_off()
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    if chart.legend and len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=8)
    _add_title(axes, chart.title)


@draw.register
def _(chart: Bars) -> Figure:
    figure = new_figure(2.2 + 2.8 * len(chart.panels), 0.32 * len(chart.names) + 1.3)
    panels = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(panels, chart.panels, strict=True):
        for row, value in enumerate(values):
            if value is None:
                continue
            length = min(value, chart.highest)
            axes.barh(row, length, color=_colour(chart.styles[row]), height=0.7)
            label = f"{value:.3g}" if value <= chart.highest else "broken"
            axes.annotate(label, (length, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_title(as_text(title), fontsize=9, loc="left")
        axes.set_xlabel(chart.x_label, fontsize=8)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(chart.names)), [as_text(name) for name in chart.names])
    panels[0].invert_yaxis()
    figure.suptitle(as_text(chart.title), fontsize=10, x=0.01, ha="left")
    return figure


@draw.register
def _(chart: BlockMap) -> Figure:
    roles = [role for role in ROLE_NAMES if any(cell.role == role for cell in chart.cells)]
    figure = new_figure(max(5.0, min(0.3 * chart.layers + 2.2, 14.0)), 0.34 * len(roles) + 1.2)
    axes = figure.subplots()
    colours = ramp(chart.ramp, "light")
    for cell in chart.cells:
        x, y = cell.layer, roles.index(cell.role)
        place = colour_bin(chart.ramp, cell.value, 0.0, chart.highest)
        face = "none" if place is None else colours[place]
        edge = _INK["ink"] if cell.shared > 1 and chart.links else _INK["rule"] if place is None else "none"
        dashes = ":" if cell.group is None else "-"
        axes.add_patch(Rectangle((x - 0.43, y - 0.43), 0.86, 0.86, facecolor=face, edgecolor=edge, linestyle=dashes))
        if place is not None and chart.layers <= 40:
            axes.text(x, y, cell.short, ha="center", va="center", fontsize=6, color=text_on(face))
    for one, other in chart.links:
        (x1, y1), (x2, y2) = ((chart.cells[at].layer, roles.index(chart.cells[at].role)) for at in (one, other))
        beside = abs(x1 - x2) + abs(y1 - y2) == 1
        axes.annotate(
            "",
            (x2, y2),
            (x1, y1),
            arrowprops={
                "arrowstyle": "-",
                "color": _INK["ink"],
                "linewidth": 2.5 if beside else 1.2,
                "connectionstyle": "arc3,rad=0" if beside else "arc3,rad=0.25",
            },
            zorder=0 if beside else 3,
        )
    axes.set_xlim(-0.6, chart.layers - 0.4)
    axes.set_ylim(len(roles) - 0.4, -0.6)
    axes.set_yticks(range(len(roles)), [ROLE_NAMES[role] for role in roles])
    axes.set_xticks(range(0, chart.layers, 1 if chart.layers <= 40 else 5))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(_mappable(chart.ramp, 0.0, chart.highest), ax=axes, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7)
    _add_title(axes, chart.title)
    return figure


@draw.register
def _(chart: Text) -> Figure:
    """The text in lines, one panel for each measure."""
    lines, widest = _wrapped(chart.pieces, 96)
    count = lines[-1][1] + 1 if lines else 1
    figure = new_figure(9.0, len(chart.measures) * (0.26 * count + 0.75))
    panels = figure.subplots(len(chart.measures), 1, squeeze=False)[:, 0]
    for axes, measure in zip(panels, chart.measures, strict=True):
        colours = ramp(measure.key, "light")
        for place, line, start, piece in lines:
            bin_ = colour_bin(measure.key, measure.values[place], measure.lowest, measure.highest)
            face = "none" if bin_ is None else colours[bin_]
            axes.add_patch(Rectangle((start, line), max(len(piece), 1), 0.86, facecolor=face, edgecolor="none"))
            axes.text(start, line + 0.46, as_text(piece), family="monospace", fontsize=7, va="center", clip_on=True)
        axes.set_xlim(0, widest)
        axes.set_ylim(count, 0)
        axes.set_axis_off()
        axes.set_title(as_text(f"{chart.title}: {measure.name} {measure.unit}".strip()), fontsize=9, loc="left")
        mappable = _mappable(measure.key, measure.lowest, measure.highest)
        figure.colorbar(mappable, ax=axes, pad=0.01, aspect=10).ax.tick_params(labelsize=7)
    return figure


def _wrapped(pieces: Sequence[str], width: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """The position of each part of a piece: (the piece's index, line, first column, text); and the column count."""
    found, line, column = [], 0, 0
    for place, piece in enumerate(pieces):
        left = piece.replace("\n", "↵") or "␣"
        while left:
            if column >= width or (column and column + len(left) > width and len(left) <= width):
                line, column = line + 1, 0
            part, left = left[: width - column], left[width - column :]
            found.append((place, line, column, part))
            column += len(part)
        if piece.endswith("\n"):
            line, column = line + 1, 0
    return found, width


def _mappable(name: str, lowest: float, highest: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(lowest, highest), ListedColormap(list(ramp(name, "light"))))


def _add_title(axes: Any, title: str) -> None:
    axes.set_title(as_text(title), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _noted(figure: Figure, note: str) -> Figure:
    """Add below a figure what it omits."""
    if note:
        columns = int(15 * figure.get_figwidth())
        figure.supxlabel(as_text(textwrap.fill(note, columns)), fontsize=8, x=0.01, ha="left", color=_INK["muted"])
    return figure


def _colour(style: int) -> str:
    return _INK["ours"] if style < 0 else SERIES["light"][style % len(SERIES["light"])]
