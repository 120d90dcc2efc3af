"""Tables and pictures of a comparison of conversions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.reporting import views
from ngc_jax.reporting.charts import Bars, BlockMap, Lines

# The methods whose best is the baseline of the excess table.
BASELINES = ("svd", "fwsvd", "asvd", "svd_llm", "basis_sharing", "ngc_paper")
Rows = Sequence[Mapping[str, Any]]


def write_report(results: Mapping[str, Any], directory: Path) -> None:
    """Write results.json, results.md and the pictures of a comparison.

    Args:
        results: `settings`, `dense` and `entries`, as `ngc-jax compare` returns them.
        directory: An existing directory.
    """
    from ngc_jax.files import write_json, write_text

    write_json(directory / "results.json", results)
    write_text(directory / "results.md", markdown(results))
    draw_comparison(results, directory)


def draw_comparison(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw the pictures that a comparison has rows for: pareto.png, levers.png, ranks.png.

    Args:
        results: As `ngc-jax compare` returns them.
        directory: Where to write them.

    Returns:
        The files.
    """
    from ngc_jax.reporting.render.figures import save_figure
    from ngc_jax.reporting.render.plots import draw

    rows: Rows = results["entries"]
    methods = [row for row in rows if row["section"] == "methods"]
    ranked = next((r for r in sorted(methods, key=lambda r: abs(r["keep"] - 0.6)) if r["allocation"] == "loss"), None)
    charts: dict[str, Lines | Bars | BlockMap] = {}
    if methods:
        charts["pareto.png"] = views.pareto(results)
    if any(row["section"] == "levers" for row in rows):
        charts["levers.png"] = views.levers(results)
    if ranked is not None and ranked["topology"] == "q-k-v-o-u-g-d":
        charts["ranks.png"] = views.rank_map(ranked)
    return [save_figure(draw(chart), directory / name) for name, chart in charts.items()]


def excess(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Log-perplexity above the dense model's, in nats per token."""
    return math.log(row["perplexity"] / dense["perplexity"])


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of a comparison."""
    dense, entries, settings = results["dense"], results["entries"], results["settings"]
    sections: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in entries:
        sections[row["section"]].append(row)
    parts = [
        f"Dense model: perplexity {dense['perplexity']:.3f} on {dense['tokens']:,} tokens of "
        f"{settings['evaluation_text']} after the first {settings['skip_tokens']:,}; "
        f"{dense['block_parameters']:,} parameters in the converted blocks, {dense['parameters']:,} in all. "
        f"Calibration: {calibration_tokens(settings)} tokens, gradients on {settings['gradient_tokens']:,} of them."
    ]
    methods = sections["methods"]
    if methods:
        parts += ["## Perplexity by keep ratio", _by_keep(methods, lambda row: f"{row['perplexity']:.3f}")]
        fractions = _fractions(methods, dense)
        if fractions:
            parts += ["## Excess log-perplexity over dense, as a fraction of the best baseline's", fractions]
        parts += [
            "## Stored parameters of the converted blocks",
            _by_keep(methods, lambda r: f"{r['stored_parameters']:,}"),
        ]
        parts += ["## Seconds: measuring + converting", _by_keep(methods, _seconds)]
        decoded = [row for row in methods if row["decode_tokens_per_second"]]
        if decoded:
            speed = dense["decode_tokens_per_second"]
            parts += [
                f"## Decoded tokens per second (dense: {speed:.1f})",
                _by_keep(decoded, lambda row: f"{row['decode_tokens_per_second']:.1f}"),
            ]
    if cost := [row for row in entries if "cost" in row]:
        lines = [[r["variant"], f"{r['cost']['seconds']:.0f}", f"{r['cost']['peak_bytes'] / 2**30:.2f}"] for r in cost]
        parts += ["## A conversion in a separate process", _table(["", "seconds", "peak GiB"], lines)]
    for section, title in (
        ("levers", "Levers"),
        ("topologies", "Topologies"),
        ("texts", "Calibration texts"),
    ):
        if rows := sections[section]:
            parts += [f"## {title}", _long(rows, dense)]
    return "\n\n".join(parts) + "\n"


def _by_keep(rows: Rows, cell: Any) -> str:
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["variant"], row["keep"]): cell(row) for row in rows}
    lines = [[f"`{name}`", *(found.get((name, keep), "") for keep in keeps)] for name in names]
    return _table(["", *(f"{keep:g}" for keep in keeps)], lines)


def _fractions(rows: Rows, dense: Mapping[str, Any]) -> str:
    """Every variant's excess over the best baseline's at the same keep ratio."""
    best: dict[float, float] = {}
    for row in rows:
        if row["variant"] in BASELINES:
            best[row["keep"]] = min(excess(row, dense), best.get(row["keep"], math.inf))
    if not best:
        return ""
    return _by_keep(
        [row for row in rows if row["keep"] in best], lambda row: f"{excess(row, dense) / best[row['keep']]:.3f}"
    )


def _seconds(row: Mapping[str, Any]) -> str:
    seconds = row["seconds"]
    return f"{seconds['measure']:.0f} + {seconds['convert']:.0f}"


def _long(rows: Rows, dense: Mapping[str, Any]) -> str:
    lines = [
        [
            f"`{row['variant']}`",
            f"{row['keep']:g}",
            row["text"],
            f"`{row['topology']}`",
            row["allocation"],
            "yes" if row["gauge"] else "no",
            f"{row['stored_parameters']:,}",
            f"{row['multiply_adds'] / dense['multiply_adds']:.3f}",
            f"{row['perplexity']:.3f}",
        ]
        for row in sorted(rows, key=lambda row: (-row["keep"],))
    ]
    head = ["", "keep", "calibration", "topology", "ranks", "gauge", "stored", "multiply-adds / dense", "perplexity"]
    return _table(head, lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *("---:" for _ in head[1:])], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def calibration_tokens(settings: Mapping[str, Any]) -> str:
    """The number of calibration tokens of a comparison, as text."""
    count = settings["calibration_tokens"]
    return "up to 65,536" if count is None else f"{count:,}"
