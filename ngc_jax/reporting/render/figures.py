"""Matplotlib's figures, made and saved with its file backend: no display is needed, no global state is changed."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ngc_jax.files import atomic_file


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, drawn to files only."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, file: Path) -> Path:
    """Write a picture (PNG) atomically; returns the file."""
    with atomic_file(file) as temporary, warnings.catch_warnings():
        # A name may be in a script that matplotlib's font does not have: boxes are drawn instead.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(temporary, format="png")
    return file


def as_text(name: str) -> str:
    """Escape dollar signs, which matplotlib would read as mathematics."""
    return name.replace("$", r"\$")
