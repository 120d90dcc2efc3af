"""Pictures, drawn with matplotlib's file backend: no display is needed and no global state is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ngc_jax.files import atomic_file

Rows = Sequence[Mapping[str, Any]]
# Perplexities above this multiple of the dense one are off the picture: the model is broken there.
_CEILING = 20.0
_OURS, _GRAY = "#c1121f", "#8d99ae"
COLOURS = ("#1d3557", "#457b9d", "#2a9d8f", "#e9a23b", "#7b5ea7", "#6b705c", "#b56576", "#118ab2", "#8d99ae")
_MARKERS = "osv^DPX<>"


def draw_comparison(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw what a comparison has rows for: pareto.png, levers.png, ranks.png.

    Args:
        results: As `ngc-jax compare` returns them.
        directory: Where.

    Returns:
        The files.
    """
    rows, dense = results["entries"], results["dense"]
    methods = [row for row in rows if row["section"] == "methods"]
    levers = [row for row in rows if row["section"] == "levers"]
    ranked = next((r for r in sorted(methods, key=lambda r: abs(r["keep"] - 0.6)) if r["allocation"] == "loss"), None)
    drawn = []
    if methods:
        drawn.append(save_figure(pareto(methods, dense), directory / "pareto.png"))
    if levers:
        drawn.append(save_figure(bars(_below_methods(levers, methods), dense), directory / "levers.png"))
    if ranked is not None and ranked["topology"] == "q-k-v-o-u-g-d":
        drawn.append(save_figure(rank_map(ranked), directory / "ranks.png"))
    return drawn


def _below_methods(levers: Rows, methods: Rows) -> Rows:
    """Variants below the method that each of them changes, as it is at the same keep ratios."""
    keeps = {row["keep"] for row in levers}
    names = dict.fromkeys(row["method"] for row in levers)
    plain = [row for row in methods if row["keep"] in keeps]
    return [
        row
        for name in names
        for row in [*(p for p in plain if p["variant"] == name), *(one for one in levers if one["method"] == name)]
    ]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn to files only."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, file: Path) -> Path:
    """Write a picture (PNG) whole or not at all; returns the file."""
    with atomic_file(file) as temporary, warnings.catch_warnings():
        # A name may be written in a script that matplotlib's font does not have: boxes are drawn.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(temporary, format="png")
    return file


def as_text(name: str) -> str:
    """No picture may read a dollar sign as mathematics."""
    return name.replace("$", r"\$")


def pareto(rows: Rows, dense: Mapping[str, Any]) -> Figure:
    """Perplexity over stored parameters, one line for each method; broken models are left out and named."""
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["variant"] for row in rows))
    others = [name for name in names if name != "ngc"]
    broken = []
    for name in names:
        points = sorted(
            (row["stored_parameters"] / dense["block_parameters"], row["perplexity"])
            for row in rows
            if row["variant"] == name and row["perplexity"] < _CEILING * dense["perplexity"]
        )
        if not points:
            broken.append(name)
            continue
        ours = name == "ngc"
        place = 0 if ours else others.index(name)
        axes.plot(
            *zip(*points, strict=True),
            color=_OURS if ours else COLOURS[place % len(COLOURS)],
            marker="*" if ours else _MARKERS[place % len(_MARKERS)],
            markersize=11 if ours else 5,
            linewidth=2.4 if ours else 1.2,
            zorder=3 if ours else 2,
            label=as_text(name),
        )
    axes.axhline(dense["perplexity"], color=_GRAY, linestyle="--", linewidth=1)
    axes.annotate(
        f"dense {dense['perplexity']:.1f}",
        (0.01, dense["perplexity"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=_GRAY,
        fontsize=9,
    )
    axes.set_yscale("log")
    ticks = [
        tick for tick in (10, 15, 20, 30, 50, 80, 100, 150, 200, 300, 500) if tick < _CEILING * dense["perplexity"]
    ]
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in ticks if low <= t <= high], [str(t) for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.set_xlabel("stored / dense parameters of the converted blocks")
    axes.set_ylabel("perplexity (log)")
    note = f"; perplexity above {_CEILING:g} x dense: {as_text(', '.join(broken))}" if broken else ""
    axes.set_title(f"One-shot conversion, no training{note}", fontsize=10, loc="left", wrap=True)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def bars(rows: Rows, dense: Mapping[str, Any]) -> Figure:
    """Excess log-perplexity of every variant, one panel for each keep ratio."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = new_figure(8.0, 0.34 * len(names) + 1.3)
    panels = np.atleast_1d(figure.subplots(1, len(keeps), sharey=True))
    for axes, keep in zip(panels, keeps, strict=True):
        found = {r["variant"]: math.log(r["perplexity"] / dense["perplexity"]) for r in rows if r["keep"] == keep}
        ceiling = math.log(_CEILING)
        for place, name in enumerate(names):
            if name not in found:
                continue
            value = found[name]
            axes.barh(
                place, min(value, ceiling), color=_OURS if name.split(",")[0] == "ngc" else COLOURS[1], height=0.7
            )
            text = f"{value:.2f}" if value < ceiling else "broken"
            axes.annotate(
                text, (min(value, ceiling), place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(names)), [as_text(name) for name in names], fontsize=8.5)
        axes.set_title(f"keep {keep:g}", fontsize=10, loc="left")
        axes.set_xlabel("ln(perplexity / dense)")
        axes.margins(x=0.18)
        _plain(axes)
    panels[0].invert_yaxis()
    return figure


def rank_map(row: Mapping[str, Any]) -> Figure:
    """Rank of every block over its full rank, by layer and role; blocks left dense are 1."""
    roles = "qkvougd"
    dense = set(row["dense_blocks"])
    layers = 1 + max(int(name.split("-")[0][1:]) for name in [*row["ranks"], *(_group(block) for block in dense)])
    full: dict[str, int] = row.get("full_ranks") or {}
    grid = np.ones((len(roles), layers))
    for name, rank in row["ranks"].items():
        layer, role = name[1:].split("-")
        grid[roles.index(role), int(layer)] = rank / full.get(name, rank)
    figure = new_figure(8.0, 2.6)
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(roles)), ["q", "k", "v", "o", "up", "gate", "down"])
    axes.set_xticks(range(0, layers, max(layers // 10, 1)))
    axes.set_xlabel("layer")
    axes.set_title(
        f"{as_text(row['variant'])} at keep {row['keep']:g}: rank / full rank (1: left dense)", fontsize=10, loc="left"
    )
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _group(block: str) -> str:
    _, layer, _, role = block.split(".")
    return f"L{layer}-{role}"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
