"""Tables and pictures of an arena, from its rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.arena.retained import Scores, retained
from experiments.arena.settings import DENSE, slug
from ngc_jax.evaluation.pairs import pair_scores
from ngc_jax.evaluation.scores import Sum
from ngc_jax.files import write_json, write_text
from ngc_jax.reporting.charts import Lines, Series
from ngc_jax.reporting.render.figures import save_figure
from ngc_jax.reporting.render.plots import draw

Row = dict[str, Any]


def compare_with_dense(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of one model with what pairs of runs say.

    Args:
        rows: As of `cells.Model.row`, the dense model's among them.

    Returns:
        Rows without the scores of single documents. Each task has `score` (mean and interval), `chance`, and in other
        rows than the dense one `retained` (share and interval, or None if the dense model is not above chance) and
        `against_dense` (difference, interval, better, worse, and the p-value of McNemar's exact test). A row has
        `retained`, the mean over its tasks with its interval, or None.
    """
    dense: dict[str, Any] = next((row["tasks"] for row in rows if row["method"] == DENSE), {})
    return [_compared(row, dense) for row in rows]


def _compared(row: Mapping[str, Any], dense: Mapping[str, Any]) -> Row:
    tasks, found = {}, []
    for name, task in row["tasks"].items():
        values, shown = task["values"][task["shown"]], Sum(tuple(task["values"][task["shown"]]))
        made = {key: value for key, value in task.items() if key not in ("values", "chance")}
        made |= {"score": {"mean": shown.mean, "interval": list(shown.interval)}}
        made |= {"chance": Sum(tuple(task["chance"])).mean}
        if row["method"] != DENSE and name in dense:
            other = dense[name]["values"][task["shown"]]
            pair = Scores(tuple(values), tuple(other), tuple(task["chance"]))
            found.append(pair)
            made["retained"] = _summary([pair])
            made["against_dense"] = pair_scores(values, other).summary()
        tasks[name] = made
    return {**row, "tasks": tasks, "retained": _summary(found)}


def _summary(pairs: Sequence[Scores]) -> dict[str, Any] | None:
    share = retained(pairs)
    return None if share is None else {"share": share.share, "interval": list(share.interval)}


def markdown(rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Sequence[str]]) -> str:
    """A table for each model.

    Args:
        rows: As of `compare_with_dense`.
        notes: Lines below a model's table.
    """
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        texts = list(dict.fromkeys(text for row in mine for text in row["perplexity"]))
        tasks = list(dict.fromkeys(task for row in mine for task in row["tasks"]))
        head = ["method", "keep", "stored parameters", *(f"perplexity, {Path(text).name}" for text in texts)]
        for task in tasks:
            shown = next(row["tasks"][task]["shown"] for row in mine if task in row["tasks"])
            head += [f"{task} {shown}, %", f"{task} retained, %"]
        table = [[*head, "retained, mean, %"] if tasks else head]
        for row in mine:
            cells = [row["method"], f"{row['keep']:g}", f"{row['parameters']:,}"]
            cells += [
                f"{row['perplexity'][text]['perplexity']:.3f}" if text in row["perplexity"] else "" for text in texts
            ]
            for task in tasks:
                cells += _task_cells(row["tasks"].get(task))
            table.append([*cells, _percents(row["retained"], "share")] if tasks else cells)
        rule = ["---", *["---:"] * (len(table[0]) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (table[0], rule, *table[1:])]
        below = [f"- {note}" for note in notes.get(model, ())]
        parts.append("\n".join([f"## {model}", "", *lines, *(["", *below] if below else [])]) + "\n")
    return "\n".join([*parts, _LEGEND])


_LEGEND = """In brackets: 95 % confidence intervals. Retained is (score - chance) / (dense score - chance) on the same
documents, with a paired bootstrap over documents; it is not given where the interval of the dense score reaches chance.
p is that of McNemar's exact test against the dense model. Chance is 1 / choices, and 0 for generated answers.
"""


def _task_cells(task: Mapping[str, Any] | None) -> list[str]:
    """Score, and retained share with the p-value."""
    if task is None:
        return ["", ""]
    pair = task.get("against_dense")
    share = _percents(task.get("retained"), "share")
    if pair is not None and pair["p_value"] is not None:
        share = f"{share}, p {pair['p_value']:.2g}".removeprefix(", ")
    return [_percents(task["score"], "mean"), share]


def _percents(found: Mapping[str, Any] | None, name: str) -> str:
    if found is None:
        return ""
    low, high = (f"{100 * edge:.1f}" if math.isfinite(edge) else "∞" for edge in found["interval"])
    return f"{100 * found[name]:.1f} ({low} to {high})"


def flat(row: Mapping[str, Any]) -> Row:
    """A row of the CSV file."""
    made = {name: row.get(name) for name in ("model", "method", "keep", "parameters", "keep_ratio", "bytes", "seconds")}
    for text, found in row["perplexity"].items():
        made |= {f"{Path(text).name} {name}": found[name] for name in ("perplexity", "bits_per_byte", "tokens")}
    for name, task in row["tasks"].items():
        low, high = task["score"]["interval"]
        made |= {f"{name} {task['shown']}": task["score"]["mean"], f"{name} low": low, f"{name} high": high}
        made |= {f"{name} documents": task["documents"], f"{name} chance": task["chance"]}
        made |= _flat_share(f"{name} retained", task.get("retained"))
        made |= {f"{name} p": task["against_dense"]["p_value"]} if "against_dense" in task else {}
    return made | _flat_share("retained", row["retained"])


def _flat_share(name: str, found: Mapping[str, Any] | None) -> Row:
    if found is None:
        return {}
    return {name: found["share"], f"{name} low": found["interval"][0], f"{name} high": found["interval"][1]}


def picture(rows: Sequence[Mapping[str, Any]], model: str) -> Lines | None:
    """Retained share against keep ratio, a line for each method; None without any."""
    mine = [row for row in rows if row["model"] == model and row["retained"] is not None]
    series = []
    for style, method in enumerate(dict.fromkeys(row["method"] for row in mine)):
        line = sorted((row for row in mine if row["method"] == method), key=lambda row: row["keep"])
        x, y = tuple(row["keep"] for row in line), tuple(100 * row["retained"]["share"] for row in line)
        series.append(Series(method, x, y, style=-1 if method == "ngc" else style, markers=True))
    if not series:
        return None
    tasks = dict.fromkeys(name for row in mine for name, task in row["tasks"].items() if task.get("retained"))
    return Lines(
        title=f"{model}: what conversions keep of the score above chance",
        description="Share of the dense model's score above chance that a converted model has, by keep ratio.",
        x_label="keep ratio",
        y_label="retained score above chance, %",
        series=tuple(series),
        rules=((100.0, "dense"), (0.0, "chance")),
        note=f"Mean over {', '.join(tasks)}.",
    )


def write_results(
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    notes: Mapping[str, Sequence[str]],
    directory: Path,
) -> None:
    """results.json, results.csv, results.md, and a picture for each model."""
    write_json(directory / "results.json", {"settings": dict(settings), "notes": dict(notes), "rows": list(rows)})
    lines = [flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(directory / "results.csv", text.getvalue())
    write_text(directory / "results.md", markdown(rows, notes))
    for model in dict.fromkeys(row["model"] for row in rows):
        chart = picture(rows, model)
        if chart is not None:
            save_figure(draw(chart), directory / f"retained-{slug(model)}.png")
