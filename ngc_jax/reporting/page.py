"""One self-contained HTML page: template, style, script and data in one file that fetches nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ngc_jax.files import write_text
from ngc_jax.reporting.charts import Bars, BlockMap, Lines, Text, number
from ngc_jax.reporting.render import svg, svg_blocks
from ngc_jax.reporting.render.colours import BINS, THEMES, colour_bin, variables
from ngc_jax.reporting.texts import visible

Chart = Lines | Bars | BlockMap


@dataclasses.dataclass(frozen=True)
class Sample:
    """The models' continuations of one prompt.

    Attributes:
        prompt: The prompt.
        texts: Model and continuation, in the order of the models.
    """

    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a section, with its own heading.

    Attributes:
        title: The heading.
        lead: The result, in a sentence or two.
        charts: Shown one below the other, or side by side if they are small.
        texts: Texts with numbers on their tokens.
        samples: Generated texts side by side.
        settings: Names and values.
        code: A command.
        notes: Remarks below.
    """

    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    texts: tuple[Text, ...] = ()
    samples: tuple[Sample, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    code: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Its anchor.
        title: Its heading.
        short: The same for the list of sections.
        how: How to read it, for readers who have not seen one before; one entry for each paragraph.
        parts: Its contents.
    """

    key: str
    title: str
    short: str
    how: tuple[str, ...]
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One figure of the overview.

    Attributes:
        figure: The number.
        what: Its meaning.
        of: The input that it belongs to.
    """

    figure: str
    what: str
    of: str


def render(title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: Its title.
        lead: A sentence below it.
        tiles: The overview.
        sections: In order.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ngc_jax.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _template("style.css", environment)(
        themes={theme: variables(theme) for theme in THEMES}, bins={name: range(count) for name, count in BINS.items()}
    )
    script = _template("script.js", environment)()
    keys = (f"c{count}" for count in itertools.count(1))
    environment.globals |= {
        "draw": _draw,
        "token_bars": svg.token_bars,
        "swatch": svg.swatch,
        "new_key": partial(next, keys),
        "token_classes": token_classes,
        "shown": _shown,
        "number": number,
        "kind": lambda chart: type(chart).__name__,
        "bins": BINS,
    }
    page = environment.get_template("page.html").render(
        title=title,
        lead=lead,
        tiles=tiles,
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page + "\n"


def write_page(page: str, file: Path) -> int:
    """Write the page atomically; returns its size in bytes."""
    write_text(file, page)
    return len(page.encode("utf-8"))


def token_classes(text: Text, place: int) -> str:
    """Classes that colour one token by each measure, and also mark its sign and size by an underline."""
    found = ["t"]
    for measure in text.measures:
        value = measure.values[place]
        colour = colour_bin(measure.key, value, measure.lowest, measure.highest)
        if value is None or colour is None:
            found.append(f"{measure.key}-none")
            continue
        found.append(f"{measure.key}-{colour}")
        if measure.diverges and value > 0:
            found.append("grows")
    return " ".join(found)


def _draw(chart: Chart, key: str) -> Markup:
    if isinstance(chart, Lines):
        return svg.lines(chart, key)
    return svg.bars(chart, key) if isinstance(chart, Bars) else svg_blocks.block_map(chart, key)


def _shown(piece: str) -> str:
    """A token as it appears in its text: a line break is both shown and made; an empty token is a dot."""
    if not piece:
        return visible(" ")
    return piece.replace("\n", "↵\n")


def _template(name: str, environment: jinja2.Environment) -> Callable[..., str]:
    """A style or a script: not HTML, and therefore not escaped; it contains no user's text."""
    plain = environment.overlay(autoescape=False)
    return lambda **values: plain.get_template(name).render(**values)


def _hash(content: str) -> str:
    """The source expression by which a content security policy allows exactly this style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def settings_rows(data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Nested settings as rows of dotted names and values."""
    rows: list[tuple[str, str]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{inner}", text) for inner, text in settings_rows(value)]
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, "–" if value is None else str(value)))
    return tuple(rows)
