"""A forest plot: effect sizes with their intervals, one line for each test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ngc_jax.reporting.render.colours import INKS, SERIES
from ngc_jax.reporting.render.figures import new_figure

_COLOURS, _GRAY = SERIES["light"], INKS["light"]["muted"]


def forest(rows: Sequence[Mapping[str, Any]], title: str, *, level: float = 0.05) -> Figure:
    """Draw effect sizes; paired ones (d_z) on the left, rank-biserial correlations on the right.

    Args:
        rows: family, comparison, quantity, pairs, effect, effect_low, effect_high, p_holm.
        title: Of the picture.
        level: Tests with an adjusted p below it are filled, the others hollow.
    """
    of_pairs, of_groups = ([row for row in rows if row["pairs"] == pairs] for pairs in (True, False))
    panels = [part for part in (of_pairs, of_groups) if part]
    heights = [len(part) + 1.5 for part in panels]
    figure = new_figure(9.5, 0.27 * sum(heights) + 1.6)
    colours = dict(zip(dict.fromkeys(row["family"] for row in rows), _COLOURS, strict=False))
    axes_of = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, part in zip(axes_of, panels, strict=True):
        for place, row in enumerate(part):
            colour = colours[row["family"]]
            sure = row["p_holm"] < level
            axes.plot([row["effect_low"], row["effect_high"]], [place, place], color=colour, linewidth=1.6)
            axes.plot(
                row["effect"], place, "o", color=colour, markersize=6, markerfacecolor=colour if sure else "white"
            )
        names = [f"{row['comparison']}: {row['quantity']}" for row in part]
        axes.set_yticks(range(len(part)), names, fontsize=8)
        axes.set_ylim(len(part) - 0.4, -0.6)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if part[0]["pairs"]:
            # Effects of a tenth and of ten standard deviations on one axis.
            axes.set_xscale("symlog", linthresh=1.0)
            most = max(max(abs(row["effect_low"]), abs(row["effect_high"])) for row in part)
            ticks = [tick for tick in (0.5, 1, 2, 5, 10, 30, 100, 300) if tick < 1.6 * most]
            axes.set_xticks([-tick for tick in ticks[::-1]] + [0, *ticks])
            axes.set_xticklabels([f"{tick:g}" for tick in axes.get_xticks()], fontsize=8)
            axes.minorticks_off()
            axes.set_xlabel("paired: Cohen's d_z (linear up to 1, then logarithmic)", fontsize=9)
        else:
            axes.set_xlim(-1, 1)
            axes.tick_params(axis="x", labelsize=8)
            axes.set_xlabel("independent samples: rank-biserial correlation", fontsize=9)
    for family, colour in colours.items():
        figure.axes[0].plot([], [], color=colour, linewidth=4, label=family)
    figure.axes[0].plot([], [], "o", color=_GRAY, label=f"Holm-adjusted p < {level:g}")
    figure.axes[0].plot([], [], "o", color=_GRAY, markerfacecolor="white", label="not")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure
