"""The charts of a report: pure functions from the JSON of a command to charts.

They take the output of `ngc-jax compare`, `stability`, `distil` and `train`, and raise KeyError, TypeError or
ValueError for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ngc_jax.reporting.charts import ROLE_NAMES, Bars, BlockMap, Cell, Lines, Series, number, percent, shorten

# Perplexities above this multiple of the dense one are left out: the model is broken there.
CEILING = 20.0
# More lines than these cannot be distinguished.
MOST_LINES = 8
OURS = "ngc"


def pareto(results: Mapping[str, Any], marks: Sequence[tuple[float, str]] = ()) -> Lines:
    """Perplexity over stored parameters, one line for each method; broken models are left out and named.

    Args:
        results: As `ngc-jax compare` returns them.
        marks: Labelled positions on the x axis.
    """
    dense = results["dense"]
    rows = [row for row in results["entries"] if row["section"] == "methods"]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    others = [name for name in names if name != OURS]
    series, broken = [], []
    for name in names:
        points, lost = pareto_points(rows, dense, name)
        broken += [f"{name} at {keep:g}" for keep in lost]
        if points:
            style = -1 if name == OURS else others.index(name)
            x, y = zip(*points, strict=True)
            series.append(Series(name, x, y, style=style, markers=True))
    note = f"Left out, because perplexity is above {CEILING:g} times the dense model's: {', '.join(broken)}."
    return Lines(
        title="Perplexity over stored parameters",
        description="Lower and further left is better. A method is on the Pareto front where no other is lower at the "
        "same size.",
        x_label="stored / dense parameters of the converted blocks",
        y_label="perplexity (log)",
        series=tuple(series),
        y_scale="log",
        rules=((float(dense["perplexity"]), f"dense {dense['perplexity']:.2f}"),),
        marks=tuple(marks),
        note=note if broken else "",
    )


def pareto_points(
    rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], variant: str
) -> tuple[list[tuple[float, float]], list[float]]:
    """The points (stored over dense parameters, perplexity) of a variant, and the keep ratios where it is broken."""
    own = [row for row in rows if row["variant"] == variant]
    usable = [row for row in own if row["perplexity"] < CEILING * dense["perplexity"]]
    points = sorted((row["stored_parameters"] / dense["block_parameters"], row["perplexity"]) for row in usable)
    return points, [row["keep"] for row in own if row not in usable]


def front(results: Mapping[str, Any]) -> list[str]:
    """Methods with at least one model that no other model of at most its size (within 1 %) outperforms."""
    rows = [row for row in results["entries"] if row["section"] == "methods"]

    def beaten(row: Mapping[str, Any]) -> bool:
        return any(
            other["stored_parameters"] <= 1.01 * row["stored_parameters"] and other["perplexity"] < row["perplexity"]
            for other in rows
            if other["variant"] != row["variant"]
        )

    return list(dict.fromkeys(row["variant"] for row in rows if not beaten(row)))


def other_variants(results: Mapping[str, Any]) -> list[Bars]:
    """Levers, topologies and calibration texts: the cost of each variant, one chart for each kind."""
    titles = {
        "levers": ("Levers", "The effect of each part of a method."),
        "topologies": ("Topologies", "The cost or gain of sharing between blocks."),
        "texts": ("Calibration texts", "The cost of calibration on another text than the one evaluated on."),
    }
    return [
        _excess_bars(rows, results["dense"], title, description)
        for section, (title, description) in titles.items()
        if (rows := [row for row in results["entries"] if row["section"] == section])
    ]


def levers(results: Mapping[str, Any]) -> Bars:
    """The levers of a comparison, each below the method that it changes, at the same keep ratios."""
    rows = [row for row in results["entries"] if row["section"] == "levers"]
    keeps = {row["keep"] for row in rows}
    plain = [row for row in results["entries"] if row["section"] == "methods" and row["keep"] in keeps]
    ordered: list[Mapping[str, Any]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        ordered += [row for row in plain if row["variant"] == method]
        ordered += [row for row in rows if row["method"] == method]
    return _excess_bars(ordered, results["dense"], "Levers", "The effect of each part of a method.")


def _excess_bars(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], title: str, description: str) -> Bars:
    """Excess log-perplexity of every variant, one panel for each keep ratio."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    values = {(row["variant"], row["keep"]): math.log(row["perplexity"] / dense["perplexity"]) for row in rows}
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    return Bars(
        title=title,
        description=f"{description} Shorter is better: the logarithm of the perplexity over the dense model's.",
        x_label="ln(perplexity / dense)",
        names=tuple(names),
        panels=tuple((f"keep {keep:g}", tuple(values.get((name, keep)) for name in names)) for keep in keeps),
        highest=math.log(CEILING),
        styles=tuple(-1 if name.replace(",", " ").split()[:1] == [OURS] else 0 for name in names),
    )


def rank_map(row: Mapping[str, Any]) -> BlockMap:
    """Rank over full rank of every block of an entry in which every block has its own group.

    Args:
        row: The entry.
    """
    full: Mapping[str, int] = row.get("full_ranks") or {}
    # Experts have no place of their own in the map.
    found = {n: (rank, full.get(n, rank)) for n, rank in row["ranks"].items() if not set(".*") & set(n)}
    places = [(int(layer), role) for layer, role in (name[1:].split("-") for name in found)]
    places += [
        (int(layer), role)
        for _, layer, _, role, *more in (block.split(".") for block in row["dense_blocks"])
        if not more
    ]
    roles, cells = list(ROLE_NAMES), []
    for layer, role in sorted(places, key=lambda place: (roles.index(place[1]), place[0])):
        name = f"L{layer}-{role}"
        rank, most = found.get(name, (None, None))
        share = 1.0 if rank is None or most is None else rank / most
        label = f"{name}: " + ("left dense" if rank is None else f"rank {rank} of {most}")
        cells.append(
            Cell(
                layer,
                role,
                group=None if rank is None else name,
                shared=1,
                value=share,
                short=f"{100 * share:.0f}",
                description=label,
                row=(name, number(rank), number(most), percent(share)),
            )
        )
    return BlockMap(
        title=f"{row['variant']} at keep {row['keep']:g}: rank / full rank, in percent (100: full, or left dense)",
        description="A row for each role, a column for each layer, coloured by the rank over the full rank.",
        ramp="kept",
        legend=("low rank", "full rank, or left dense"),
        highest=1.0,
        layers=1 + max(layer for layer, _ in places),
        cells=tuple(cells),
        links=(),
        by_layer=(),
        by_role={},
        margin="",
        head=("block", "rank", "full rank", "share"),
    )


def growth(results: Mapping[str, Any]) -> Lines:
    """How random perturbations grow over the layers (median, 10 % to 90 % of tokens) or a segment (mean, range)."""
    prompts = results["prompts"][:MOST_LINES]
    depth = results["along"] == "depth"
    series = []
    for place, prompt in enumerate(prompts):
        curves = np.array(prompt["growth"], float)
        if depth:
            low, middle, high = np.quantile(curves[1:], (0.1, 0.5, 0.9), axis=0)
        else:
            curves = np.pad(curves, ((0, 0), (1, 0)))
            low, middle, high = curves.min(axis=0), curves.mean(axis=0), curves.max(axis=0)
        x = tuple(map(float, range(len(middle))))
        edges = tuple(low.tolist()), tuple(high.tolist())
        series.append(Series(prompt_label(place, prompt), x, tuple(middle.tolist()), *edges, style=place))
    return Lines(
        title="Growth of small perturbations" + (" over the layers" if depth else " over a segment"),
        description="Where a line falls, perturbations decay. "
        + ("Line: the median token; band: 10 % to 90 % of tokens." if depth else "Line: mean; band: all segments."),
        x_label="layers passed" if depth else "tokens after the perturbed ones",
        y_label="ln(perturbation / stream)" if depth else "ln(perturbation of the memory)",
        series=tuple(series),
        rules=((0.0, ""),),
        note=_more(results),
    )


def metric_over_text(results: Mapping[str, Any]) -> Lines:
    """The neuronal stability metric of every token, or of every segment, of each prompt."""
    depth = results["along"] == "depth"
    series = []
    for place, prompt in enumerate(results["prompts"][:MOST_LINES]):
        metric = prompt["tokens_metric"][1:] if depth else prompt["segments"]
        x = range(1, len(metric) + 1) if depth else prompt["ends"]
        name = prompt_label(place, prompt)
        series.append(Series(name, tuple(map(float, x)), tuple(metric), style=place, markers=not depth))
    return Lines(
        title="Neuronal stability metric by " + ("token" if depth else "segment"),
        description="Below 0 perturbations decay.",
        x_label="token" if depth else "last token of the segment",
        y_label="rate per layer" if depth else "rate per token",
        series=tuple(series),
        rules=((0.0, ""),),
        legend=False,
    )


def spectra(results: Mapping[str, Any]) -> list[Lines]:
    """Exponent spectra by depth: for every prompt the growth in each layer along each direction, mean over tokens."""
    charts = []
    prompts = results["prompts"][:MOST_LINES]
    values = [value for prompt in prompts for row in prompt["layer_exponents"] for value in row if value is not None]
    values = [0.0, *filter(math.isfinite, values)]
    span = (min(values), max(values))
    for place, prompt in enumerate(prompts):
        rows = prompt["layer_exponents"]
        count = len(rows[0])
        x = tuple(float(layer) for layer in range(len(rows)))
        series = tuple(
            Series(
                f"direction {direction + 1}",
                x,
                tuple(row[direction] for row in rows),
                style=place,
                strength=1 - 0.75 * direction / max(count - 1, 1),
            )
            for direction in range(count)
        )
        charts.append(
            Lines(
                title=prompt_label(place, prompt),
                description=f"Growth along {count} directions in every layer, from the most expanding (strong) to the "
                "least (faint).",
                x_label="layer",
                y_label="exponent per layer",
                series=series,
                y_scale="asinh",
                y_range=span,
                rules=((0.0, ""),),
                legend=False,
            )
        )
    return charts


def potential_by_layer(results: Mapping[str, Any]) -> Lines:
    """Share of each layer's motion that the rest of the prompt drives, mean over tokens."""
    return Lines(
        title="Share of the potential by layer",
        description="Share of a token's motion in each layer that the rest of the prompt drives: 0 none, 1 all.",
        x_label="layer",
        y_label="share of the potential",
        series=tuple(
            Series(
                prompt_label(place, prompt),
                tuple(map(float, range(len(prompt["layer_potential_share"])))),
                tuple(prompt["layer_potential_share"]),
                style=place,
            )
            for place, prompt in enumerate(results["prompts"][:MOST_LINES])
        ),
        note=_more(results),
    )


def prompt_label(place: int, prompt: Mapping[str, Any]) -> str:
    """Name a prompt by its number and beginning."""
    return f"{place + 1}: {shorten(prompt['text'], 32)}"


def training(rows: Sequence[Mapping[str, float]]) -> list[Lines]:
    """Loss over steps, and perplexity where it was measured; of two lines for one step the later counts.

    Args:
        rows: The lines of metrics.jsonl.
    """
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    ordered = sorted(merged.items())
    names = ("loss", "cross_entropy", "divergence", "hidden")
    losses = [name for name in names if any(name in row for _, row in ordered)]
    # A part that equals the whole loss is the same line.
    losses = [n for n in losses if n == "loss" or any(row.get(n) != row.get("loss") for _, row in ordered if n in row)]
    charts = []
    if losses:
        series = [_curve(ordered, name, place) for place, name in enumerate(losses)]
        charts.append(
            Lines(
                title="Loss by step",
                description="The training objective on the training text, in nats per token.",
                x_label="step",
                y_label="loss (nats per token)",
                series=tuple(series),
            )
        )
    if any("perplexity" in row for _, row in ordered):
        charts.append(
            Lines(
                title="Perplexity on held-out text",
                description="Measured on text that was not trained on. Lower is better.",
                x_label="step",
                y_label="perplexity",
                series=(_curve(ordered, "perplexity", 0, markers=True),),
            )
        )
    if not charts:
        raise ValueError("no line has a loss or a perplexity")
    return charts


def _curve(ordered: Sequence[tuple[int, Mapping[str, float]]], name: str, place: int, markers: bool = False) -> Series:
    points = [(float(step), row[name]) for step, row in ordered if name in row]
    x, y = zip(*points, strict=True)
    return Series(name.replace("_", " "), x, y, style=place, markers=markers)


def _more(results: Mapping[str, Any]) -> str:
    left_out = len(results["prompts"]) - MOST_LINES
    return f"{left_out} more prompts are not drawn." if left_out > 0 else ""
