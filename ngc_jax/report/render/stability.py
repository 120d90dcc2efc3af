"""Pictures of stability: how perturbations grow along depth or along a text, and token by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ngc_jax.report.render.figures import COLOURS, new_figure, save_figure


def draw_stability(results: Mapping[str, Any], directory: Path) -> Path:
    """Draw stability.png.

    Args:
        results: As `ngc-jax stability` returns them.
        directory: Where.

    Returns:
        The file.
    """
    figure = along_depth(results) if results["along"] == "depth" else along_sequence(results)
    return save_figure(figure, directory / "stability.png")


def along_depth(results: Mapping[str, Any], most: int = 8) -> Figure:
    """Left, how random perturbations grow over the layers (median token of each prompt); right, the metric by token."""
    figure = new_figure(10, 4)
    over_layers, by_token = figure.subplots(1, 2)
    for number, prompt in enumerate(results["prompts"][:most]):
        colour = COLOURS[number % len(COLOURS)]
        growth = np.array(prompt["growth"])[1:]
        low, middle, high = np.quantile(growth, (0.1, 0.5, 0.9), axis=0)
        layers = np.arange(len(middle))
        over_layers.plot(layers, middle, color=colour, label=_label(prompt["text"]))
        over_layers.fill_between(layers, low, high, color=colour, alpha=0.12, linewidth=0)
        metric = np.array(prompt["tokens_metric"])
        by_token.plot(np.arange(1, len(metric)), metric[1:], color=colour, linewidth=1)
    over_layers.set(
        title="growth over the layers: median token, 10 % to 90 %",
        xlabel="layers passed",
        ylabel="log (perturbation / stream)",
    )
    by_token.set(title="neuronal stability metric by token", xlabel="token", ylabel="rate per layer")
    _finish(figure, results, most)
    return figure


def along_sequence(results: Mapping[str, Any], most: int = 8) -> Figure:
    """Left, how random perturbations of the cache fade over a segment; right, the metric of every segment."""
    figure = new_figure(10, 4)
    over_tokens, by_segment = figure.subplots(1, 2)
    for number, prompt in enumerate(results["prompts"][:most]):
        colour = COLOURS[number % len(COLOURS)]
        growth = np.pad(np.array(prompt["growth"]), ((0, 0), (1, 0)))
        over_tokens.plot(growth.mean(axis=0), color=colour, label=_label(prompt["text"]))
        if len(growth) > 1:
            low, high = growth.min(axis=0), growth.max(axis=0)
            over_tokens.fill_between(range(growth.shape[1]), low, high, color=colour, alpha=0.12, linewidth=0)
        by_segment.plot(prompt["ends"], prompt["segments"], color=colour, marker="o", markersize=3, linewidth=1)
    over_tokens.set(
        title="growth over a segment: mean and range",
        xlabel="tokens after the perturbed ones",
        ylabel="log (perturbation of the memory)",
    )
    by_segment.set(
        title="neuronal stability metric by segment", xlabel="last token of the segment", ylabel="rate per token"
    )
    _finish(figure, results, most)
    return figure


def _finish(figure: Figure, results: Mapping[str, Any], most: int) -> None:
    for axes in figure.axes:
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.axes[0].legend(fontsize=7, frameon=False)
    left_out = len(results["prompts"]) - most
    more = f", {left_out} more prompts not drawn" if left_out > 0 else ""
    figure.suptitle(f"{results['model']} along {results['along']}: below 0 perturbations fade{more}", fontsize=11)


def _label(text: str, most: int = 40) -> str:
    """Plain text: no picture may read a dollar sign as mathematics."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= most else f"{line[: most - 1]}…"
