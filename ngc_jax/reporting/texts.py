"""Stability over the text itself: prompts with a number for each token or segment.

From the JSON that `ngc-jax stability` writes, as in `views.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ngc_jax.reporting.charts import Measure, Number, Text, nice_limit, number, percent, shorten, signed
from ngc_jax.reporting.views import prompt_label


def texts(results: Mapping[str, Any], limits: tuple[float, float]) -> list[Text]:
    """Every prompt with its numbers, token by token (depth) or segment by segment (sequence).

    Args:
        results: As `ngc-jax stability` returns them.
        limits: The rate and the share of the last colours; see `colour_limits`.
    """
    one = _tokens if results["along"] == "depth" else _segments
    return [one(place, prompt, results, limits) for place, prompt in enumerate(results["prompts"])]


def colour_limits(many: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """One scale for the rates, and one for the potential's shares, of several results, to make colours comparable."""
    prompts = [prompt for results in many for prompt in results["prompts"]]
    rates = [rate for prompt in prompts for rate in _rates(prompt)]
    shares = [share for prompt in prompts for share in prompt.get("tokens_potential_share", [0.0, 1.0])[1:]]
    return nice_limit(rates), min(nice_limit(shares), 1.0)


def _rates(prompt: Mapping[str, Any]) -> Sequence[float]:
    """The rates without the first token's, which has no context."""
    return prompt["tokens_metric"][1:] if "tokens_metric" in prompt else prompt["segments"]


def _tokens(place: int, prompt: Mapping[str, Any], results: Mapping[str, Any], limits: tuple[float, float]) -> Text:
    pieces, unit = prompt["tokens"], results["unit"].replace("1 / ", "per ")
    rates: list[Number] = list(prompt["tokens_metric"])
    shares: list[Number] = list(prompt["tokens_potential_share"])
    errors: list[Number] = list(prompt["tokens_error"] or [None] * len(pieces))
    labels, rows = [], []
    for index, (piece, rate, error, share) in enumerate(zip(pieces, rates, errors, shares, strict=True)):
        spread = "" if error is None else f" ± {number(error, 2)}"
        parts = [f"token {index} “{visible(piece)}”", f"stability {signed(rate)}{spread} {unit}"]
        parts += [f"{'grows' if rate is not None and rate > 0 else 'decays'}", f"potential {percent(share)}"]
        labels.append("; ".join([*parts, *(["first token, not counted"] if index == 0 else [])]))
        rows.append((visible(piece), str(index), signed(rate), number(error, 2), percent(share)))
    # The first token's numbers are in the table, but it gets no colour, since it differs from all others.
    measures = (
        Measure("stability", "stability", unit, (None, *rates[1:]), -limits[0], limits[0]),
        Measure("potential", "share of the potential", "", (None, *shares[1:]), 0.0, limits[1]),
    )
    summary = f"{_mean(prompt)} {unit}; potential {percent(prompt['potential_share'])} of the motion"
    head = ("token", "place", f"stability {unit}", "± its error", "potential")
    return Text(prompt_label(place, prompt), summary, tuple(pieces), tuple(labels), measures, True, head, tuple(rows))


def _segments(place: int, prompt: Mapping[str, Any], results: Mapping[str, Any], limits: tuple[float, float]) -> Text:
    tokens, memory = prompt["tokens"], int(results["memory"])
    unit = results["unit"].replace("1 / ", "per ")
    # The tokens before the first segment are only perturbed, and those after the last segment are not read.
    pieces = ["".join(tokens[:memory])]
    labels = [f"tokens 0 to {memory - 1}; perturbed first, nothing is measured here"]
    rates: list[Number] = [None]
    rows = []
    for index, (end, rate) in enumerate(zip(prompt["ends"], prompt["segments"], strict=True)):
        piece = "".join(tokens[end - memory + 1 : end + 1])
        way = "grows" if rate > 0 else "decays"
        labels.append(
            f"segment {index + 1}; tokens {end - memory + 1} to {end}; stability {signed(rate)} {unit}; a perturbation "
            f"of the {memory} tokens before {way} to {percent(math.exp(rate * memory), 0)} in these"
        )
        pieces.append(piece)
        rates.append(rate)
        rows.append((str(index + 1), f"{end - memory + 1}–{end}", signed(rate), shorten(piece, 60)))
    if rest := "".join(tokens[prompt["ends"][-1] + 1 :]):
        pieces, rates = [*pieces, rest], [*rates, None]
        labels.append(f"the last {len(tokens) - 1 - prompt['ends'][-1]} tokens; too few for a segment")
    measures = (Measure("stability", "stability", unit, tuple(rates), -limits[0], limits[0]),)
    head = ("segment", "tokens", f"stability {unit}", "text")
    summary = f"{_mean(prompt)} {unit}"
    return Text(prompt_label(place, prompt), summary, tuple(pieces), tuple(labels), measures, False, head, tuple(rows))


def _mean(prompt: Mapping[str, Any]) -> str:
    spread = "" if prompt["error"] is None else f" ± {number(prompt['error'], 2)}"
    return f"mean stability {signed(prompt['metric'])}{spread}"


def visible(piece: str) -> str:
    """A token as it is read out and shown: white space is replaced by symbols."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    shown = "".join(signs.get(letter, letter) for letter in piece)
    return "␣" * len(shown) if not shown.strip() else shown.strip()
