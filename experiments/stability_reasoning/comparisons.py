"""From measurements to a table of tests; which tests are made, and which are primary, is fixed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.stability_reasoning.statistics import Difference, holm, paired, residuals, unpaired

# Primary: the two numbers that `ngc-jax stability --along depth` gives for a prompt. Fixed before any measurement.
PRIMARY = {"metric": "metric along depth", "share": "potential's share"}
# Secondary: the same over the tokens that both prompts of a pair share, and the metric along the sequence.
SECONDARY = {
    "common_metric": "metric, common tokens only",
    "common_share": "share, common tokens only",
    "sequence": "metric along the sequence",
}
LEAST_COMMON = 8  # tokens; the small model's prompts share little more than an equals sign
Measured = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]


def compare(family: str, measured: Measured, right: Sequence[bool], *, seed: int = 0) -> list[dict[str, Any]]:
    """All tests of one family of models.

    Args:
        family: Name of the family.
        measured: For every model (`dense`, `random`, and compact ones by name) and for `sequence` (of the dense model),
            the rows of each pair: the prompt that needs steps, and the one that does not. For `answers`, single rows of
            the dense model, for prompts of which it answers some.
        right: Whether it answers correctly; the prompts that need steps if there are no `answers`.
        seed: Of the bootstrap.

    Returns:
        A row for each test: family, comparison, quantity, primary, and the fields of `Difference`.
    """
    rows: list[dict[str, Any]] = []
    hard, easy = ([pair[side] for pair in measured["dense"]] for side in (0, 1))

    def add(comparison: str, quantity: str, difference: Difference | None) -> None:
        if difference is not None:
            names = {**PRIMARY, **SECONDARY}
            row = {"family": family, "comparison": comparison, "quantity": names[quantity]}
            rows.append({**row, "primary": quantity in PRIMARY, **dataclasses.asdict(difference)})

    for name in (*PRIMARY, "common_metric", "common_share"):
        if not name.startswith("common") or min(_of(hard, "common")) >= LEAST_COMMON:
            add("needs steps - does not", name, paired(_of(easy, name), _of(hard, name), seed=seed))
    asked = [rows_of[0] for rows_of in measured["answers"]] if "answers" in measured else hard
    for name in PRIMARY:
        # Prompts of different length differ in other ways too: the effect of the length is removed first.
        values = residuals(_of(asked, name), _of(asked, "tokens"))
        add("right - wrong", name, _by_answer(values, right, seed))
    if "sequence" in measured:
        sequence = [[pair[side] for pair in measured["sequence"]] for side in (0, 1)]
        along = [_of(side, "sequence") for side in sequence]
        add("needs steps - does not", "sequence", paired(along[1], along[0], seed=seed))
    for model in measured:
        if model in ("dense", "sequence", "answers"):
            continue
        count = len(measured[model])
        for name in PRIMARY:
            theirs = [pair[side][name] for pair in measured[model] for side in (0, 1)]
            ours = [pair[side][name] for pair in measured["dense"][:count] for side in (0, 1)]
            # The mean of both prompts of a pair: two prompts about one story are not independent.
            theirs, ours = (np.reshape(both, (count, 2)).mean(axis=1).tolist() for both in (theirs, ours))
            if model == "random":
                add("trained - random weights", name, paired(theirs, ours, seed=seed))
            else:
                add(f"{model} - dense", name, paired(ours, theirs, seed=seed))
    return rows


def corrected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with Holm's adjustment over all of them, in `p_holm`."""
    return [{**row, "p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def markdown(results: Mapping[str, Any]) -> str:
    """The table with notes on the prompts."""
    lines = [f"{results['family_notes'][family]}\n" for family in results["family_notes"]]
    lines += [
        "| model | comparison | quantity | n | difference [95 % CI] | effect [95 % CI] | p | Holm |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["tests"]:
        n = f"{row['n'][0]}" if row["pairs"] else f"{row['n'][0]} wrong, {row['n'][1]} right"
        kind = "d_z" if row["pairs"] else "r"
        mark = "**" if row["p_holm"] < 0.05 else ""
        quantity = row["quantity"] if row["primary"] else f"*{row['quantity']}*"
        lines.append(
            f"| {row['family']} | {row['comparison']} | {quantity} | {n} | "
            f"{row['mean']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}] | "
            f"{kind} {row['effect']:+.2f} [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}] | "
            f"{row['p']:.2g} | {mark}{row['p_holm']:.2g}{mark} |"
        )
    return "\n".join(lines) + "\n"


def note(family: str, measured: Measured, *answers: tuple[str, Sequence[bool]]) -> str:
    """A note on the prompts: lengths, shared tokens of the pairs, correct answers."""
    pairs = measured["dense"]
    gaps = np.array([pair[0]["tokens"] - pair[1]["tokens"] for pair in pairs])
    tokens = np.mean([row["tokens"] for pair in pairs for row in pair])
    common = np.mean([pair[0]["common"] for pair in pairs])
    replied = "; ".join(f"{sum(right)} of {len(right)} {what}" for what, right in answers)
    return (
        f"{family}: {len(pairs)} pairs of prompts of {tokens:.1f} tokens on average, {common:.1f} of them in common at "
        f"the end. The one that needs steps is {gaps.mean():+.2f} tokens longer ({int(np.sum(gaps == 0))} pairs of "
        f"equal length). The dense model answers {replied}."
    )


def _by_answer(values: Sequence[float] | np.ndarray, right: Sequence[bool], seed: int) -> Difference | None:
    parts = [[value for value, one in zip(values, right, strict=True) if one == which] for which in (False, True)]
    return unpaired(*parts, seed=seed)


def _of(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]
