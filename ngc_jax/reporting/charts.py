"""Charts as plain data, independent of how they are drawn.

`views.py`, `texts.py` and `blocks.py` compute them from results; `render/` draws them as SVG or with matplotlib. Every
chart has an equivalent table.
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
        y: Values; None for a missing one.
        low: Lower edge of a band around the line.
        high: Upper edge.
        style: Its index in the palette; -1 for the highlighted one.
        markers: Whether its points are marked.
        strength: 1 for a line of full weight, less for secondary ones.
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
        y_scale: Scale of y; asinh is linear near 0 and logarithmic far from it, on both sides.
        y_range: The lowest and highest y, for pictures that are compared; the range of the lines if None.
        rules: Labelled horizontal lines.
        marks: Labelled vertical lines.
        note: What the picture omits, if anything.
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
    """Horizontal bars that begin at 0, in adjacent panels.

    Attributes:
        title: What is shown.
        description: How to read it.
        x_label: The quantity that the bars show.
        names: Names of the rows.
        panels: Title and values (None for a missing one) of each panel.
        highest: Longer bars are cut there.
        styles: Palette index of each row.
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
        shared: Number of the group's members; 1 for a private group.
        value: The coloured value, 0 to the map's `highest`; None to show nothing.
        short: The text on it, if there is room.
        description: All its numbers as text.
        row: The same for a table.
    """

    layer: int
    role: str
    group: str | None
    shared: int
    value: Number
    short: str
    description: str
    row: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The blocks of a model: a row for each role, a column for each layer.

    Attributes:
        title: What is shown.
        description: How to read it.
        ramp: Name of the colours.
        legend: Meaning of the lowest and the highest colour.
        highest: The value of the last colour.
        layers: Number of layers.
        cells: The blocks.
        links: Pairs of indices into `cells` that chain the members of each group together.
        by_layer: A number between 0 and 1 for every layer; None for no number.
        by_role: The same for every role.
        margin: Name of those numbers.
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
        key: A short identifier.
        name: Its name.
        unit: Its unit.
        values: The numbers; None for a missing one.
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
    """A text with one or more numbers for each of its tokens or segments.

    Attributes:
        title: Its beginning.
        summary: The result for the whole text.
        pieces: The tokens or segments.
        descriptions: The numbers of each piece as text.
        measures: Measures that can colour the pieces.
        bars: Whether each piece has a bar above the text.
        head: Column names of the table.
        rows: The table.
    """

    title: str
    summary: str
    pieces: tuple[str, ...]
    descriptions: tuple[str, ...]
    measures: tuple[Measure, ...]
    bars: bool
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """A row for each piece."""
        return Table(self.head, self.rows)


def number(value: Number, digits: int = 4) -> str:
    """A number for display: significant digits, thousands separated, a true minus sign; a dash for None."""
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
    """A rate with its sign, to `digits` decimal places."""
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
    """A round limit that few of the values exceed: their 95th percentile, rounded up to at most two digits."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    found = sizes[math.ceil(0.95 * (len(sizes) - 1))] if sizes else 0.0
    if found == 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(found))
    return next(step * unit for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= found * (1 - 1e-9))
