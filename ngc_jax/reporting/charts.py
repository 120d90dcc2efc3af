"""Charts as plain data: what is drawn, without saying how.

`views.py`, `texts.py` and `blocks.py` compute them from results; `render/` draws them as SVG or with matplotlib. Every
chart can say the same as a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

Number = float | None
# In the order of the rows of a map.
ROLE_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output", "u": "up", "g": "gate", "d": "down"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its first column is text, the others are numbers.

    Attributes:
        head: Column names.
        rows: Rows of cells.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        x: Positions.
        y: Values; None where there is none.
        low: Lower edge of a band around the line.
        high: Upper edge.
        style: Its place in the palette; -1 for the one that is set off from all others.
        markers: Whether its points are marked.
        strength: 1 for a line of full weight, less for those that only accompany it.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[Number, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    style: int = 0
    markers: bool = False
    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class Lines:
    """A line chart.

    Attributes:
        title: What is shown.
        description: How to read it, in a sentence; a screen reader says it with the title.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        series: The lines.
        y_scale: How y is laid out; asinh is linear near 0 and logarithmic far from it, on both sides.
        y_range: The lowest and highest y, for pictures that are compared; what the lines need if None.
        rules: Labelled horizontal lines.
        marks: Labelled vertical lines.
        note: What is left out of the picture, if anything.
        legend: Whether the lines are named beside the picture.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_scale: Literal["linear", "log", "asinh"] = "linear"
    y_range: tuple[float, float] | None = None
    rules: tuple[tuple[float, str], ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""
    legend: bool = True

    def table(self) -> Table:
        """All points: a row for each x, a column for each line (and for the edges of its band)."""
        columns: list[tuple[str, dict[float, Number]]] = []
        for one in self.series:
            columns.append((one.name, dict(zip(one.x, one.y, strict=True))))
            for edge, values in (("low", one.low), ("high", one.high)):
                if values is not None:
                    columns.append((f"{one.name}, {edge}", dict(zip(one.x, values, strict=True))))
        places = sorted({x for one in self.series for x in one.x})
        rows = ((number(x), *(number(values.get(x)) for _, values in columns)) for x in places)
        return Table((self.x_label, *(name for name, _ in columns)), tuple(rows))


@dataclasses.dataclass(frozen=True)
class Bars:
    """Horizontal bars that begin at 0, in panels side by side.

    Attributes:
        title: What is shown.
        description: How to read it.
        x_label: What the length is.
        names: A row each.
        panels: Title and values (None where there is none) of each panel.
        highest: Longer bars are cut there.
        styles: Place in the palette of each row.
    """

    title: str
    description: str
    x_label: str
    names: tuple[str, ...]
    panels: tuple[tuple[str, tuple[Number, ...]], ...]
    highest: float
    styles: tuple[int, ...]

    def table(self) -> Table:
        """A row for each name, a column for each panel."""
        rows = ((name, *(number(values[place]) for _, values in self.panels)) for place, name in enumerate(self.names))
        return Table(("variant", *(title for title, _ in self.panels)), tuple(rows))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One block of a model.

    Attributes:
        layer: Its layer.
        role: Its role, one of q k v o u g d.
        group: The name of its group; None for a block that is dense.
        shared: How many members the group has; 1 for a block of its own.
        value: What colours it, 0 to the map's `highest`; None for nothing to show.
        short: What is written on it, if there is room.
        told: All its numbers, in words.
        row: The same for a table.
    """

    layer: int
    role: str
    group: str | None
    shared: int
    value: Number
    short: str
    told: str
    row: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The blocks of a model: a row for each role, a column for each layer.

    Attributes:
        title: What is shown.
        description: How to read it.
        ramp: Which colours.
        legend: What the colours' ends mean, the lower and the upper.
        highest: The value of the last colour.
        layers: How many.
        cells: The blocks.
        links: Pairs of cells, by their places in `cells`, that chain the members of each group together.
        by_layer: A number between 0 and 1 for every layer; None for no number.
        by_role: The same for every role.
        margin: What those numbers are.
        head: Column names of the table.
    """

    title: str
    description: str
    ramp: Literal["kept", "loss"]
    legend: tuple[str, str]
    highest: float
    layers: int
    cells: tuple[Cell, ...]
    links: tuple[tuple[int, int], ...]
    by_layer: tuple[Number, ...]
    by_role: dict[str, Number]
    margin: str
    head: tuple[str, ...]

    def table(self) -> Table:
        """A row for each block."""
        return Table(self.head, tuple(cell.row for cell in self.cells))


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number for each token.

    Attributes:
        key: A word for it.
        name: What it is.
        unit: Its unit.
        values: The numbers; None where there is none.
        lowest: The value of the first colour.
        highest: The value of the last colour.
    """

    key: Literal["stability", "potential"]
    name: str
    unit: str
    values: tuple[Number, ...]
    lowest: float
    highest: float

    @property
    def diverges(self) -> bool:
        """Whether 0 is the middle of the colours."""
        return self.lowest < 0


@dataclasses.dataclass(frozen=True)
class Text:
    """A text with a number, or several, for each of its tokens or stretches of tokens.

    Attributes:
        title: Its beginning.
        summary: What was found for the whole text.
        pieces: The tokens or stretches.
        told: For each, its numbers in words.
        measures: What can colour them.
        bars: Whether each piece has a bar of its own above the text.
        head: Column names of the table.
        rows: The table.
    """

    title: str
    summary: str
    pieces: tuple[str, ...]
    told: tuple[str, ...]
    measures: tuple[Measure, ...]
    bars: bool
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """A row for each piece."""
        return Table(self.head, self.rows)


def number(value: Number, digits: int = 4) -> str:
    """A number for people: significant digits, thousands apart, a true minus sign; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    whole = float(value).is_integer() and abs(value) < 1e15
    text = f"{int(value):,}" if whole else f"{value:.{digits}g}"
    if not whole and ("e" in text or abs(value) >= 1000):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"
    return text.replace("-", "−")


def signed(value: Number, digits: int = 4) -> str:
    """A rate: always with its sign, so many digits behind the point."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: Number, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def shorten(text: str, most: int = 48) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def nice_limit(values: Sequence[float]) -> float:
    """A round number that few of the sizes exceed: their 95th percentile, rounded up to two digits at most."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    found = sizes[math.ceil(0.95 * (len(sizes) - 1))] if sizes else 0.0
    if found == 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(found))
    return next(step * unit for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= found * (1 - 1e-9))
