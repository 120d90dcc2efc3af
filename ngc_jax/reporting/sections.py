"""The sections of a report: the results of each input, with explanations in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.models.inspect import Inspection
from ngc_jax.reporting import blocks, texts, views
from ngc_jax.reporting.charts import Bars, Lines, number, percent, signed
from ngc_jax.reporting.comparison import calibration_tokens
from ngc_jax.reporting.explanations import TITLES, how
from ngc_jax.reporting.inputs import Found, Inputs, readable
from ngc_jax.reporting.page import Part, Sample, Section, Tile, settings_rows

Errors = Mapping[str, Mapping[str, float]]


def make_sections(
    inputs: Inputs, *, dense: str | None, errors: Errors, samples: Sequence[Sample], most_texts: int
) -> tuple[list[Tile], list[Section]]:
    """The overview and the sections for the inputs.

    Args:
        inputs: The inputs.
        dense: The dense model that blocks were compared with, if any.
        errors: By path of a compact model, the errors of its blocks.
        samples: Generated texts.
        most_texts: Number of prompts of each stability.json that are shown token by token.

    Raises:
        UsageError: If a file is not what its command writes.
    """
    tiles: list[Tile] = []
    found: list[Section | None] = [
        _groups(inputs, dense, tiles),
        _losses(inputs, errors, dense),
        _pareto(inputs, tiles),
        *_stability(inputs, most_texts, tiles),
        _training(inputs, tiles),
        _samples(samples),
    ]
    return tiles, [section for section in found if section is not None]


def _groups(inputs: Inputs, dense: str | None, tiles: list[Tile]) -> Section | None:
    parts = []
    for model in inputs.models:
        found, c = model.data, model.data.config
        summary = found.summary()
        shape = (
            f"{c.architecture}, {c.num_layers} layers of width {c.embed_dim:,}, "
            f"{summary['total_parameters']:,} parameters in all, {summary['bytes'] / 1e6:,.1f} MB of tensors"
        )
        if found.plan is None:
            parts.append(Part(model.label, f"A dense model, with no groups: {shape}."))
            tiles.append(Tile(f"{summary['total_parameters'] / 1e6:,.1f} M", "parameters, dense", model.label))
            continue
        shared = [group for group in found.plan.groups if len(group.members) > 1]
        alone = len(found.plan.groups) - len(shared)
        sharing = (
            f"{len(shared)} of them shared by several blocks" if shared else "each of one block: nothing is shared"
        )
        if shared and not alone:
            sharing = "all of them shared by several blocks"
        how = found.conversion or {}
        made = (
            f" Made by {how['method']} with topology {how['topology']}." if {"method", "topology"} <= set(how) else ""
        )
        lead = (
            f"{len(found.plan.groups):,} groups, {sharing}, store {summary['stored_parameters']:,} of the "
            f"{summary['dense_parameters']:,} parameters of their blocks: keep ratio {summary['keep_ratio']:.4f}."
            f"{made} {shape[0].upper()}{shape[1:]}."
        )
        notes = () if dense else ("How much each block lost is left out: name the dense model with --dense to see it.",)
        chart = blocks.kept_map(c, found.plan, model.label)
        parts.append(Part(model.label, lead, (chart,), notes=notes))
        tiles.append(Tile(percent(summary["keep_ratio"]), "of the blocks' parameters kept", model.label))
    return _section("groups", parts)


def _losses(inputs: Inputs, errors: Errors, dense: str | None) -> Section | None:
    parts = []
    for model in inputs.models:
        own = errors.get(model.path)
        if own is None or model.data.plan is None:
            continue
        chart = blocks.loss_map(model.data.config, model.data.plan, own, model.label)
        worst = max(own, key=lambda name: own[name])
        mean = (sum(error**2 for error in own.values()) / len(own)) ** 0.5
        lead = (
            f"Against {dense}: from {percent(min(own.values()))} to {percent(max(own.values()))}, most in {worst}; "
            f"root mean square over the blocks {percent(mean)}. Bars are root mean squares by layer and by role."
        )
        parts.append(Part(model.label, lead, (chart,)))
    return _section("losses", parts)


def _pareto(inputs: Inputs, tiles: list[Tile]) -> Section | None:
    parts = []
    marks = [
        (model.data.summary()["keep_ratio"], model.label) for model in inputs.models if model.data.plan is not None
    ]
    # If several fall on the same place, their labels would overlap.
    marks = [(keep, label) for i, (keep, label) in enumerate(marks) if all(abs(keep - k) > 0.02 for k, _ in marks[:i])]
    for one in inputs.comparisons:
        with readable(one.path, "results.json", "compare"):
            dense, settings = one.data["dense"], one.data["settings"]
            chart = views.pareto(one.data, marks)
            front = views.front(one.data)
            charts: list[Lines | Bars] = [*([chart] if chart.series else []), *views.other_variants(one.data)]
            lead = (
                f"Dense model: perplexity {dense['perplexity']:.2f} on {dense['tokens']:,} tokens of "
                f"{settings['evaluation_text']}; calibrated on {calibration_tokens(settings)} tokens. "
            )
            if front:
                lead += f"On the front: {', '.join(front)}."
            best = min(one.data["entries"], key=lambda row: row["perplexity"])
            tiles.append(
                Tile(
                    f"{best['perplexity']:.2f}",
                    f"best perplexity, {best['variant']} at keep {best['keep']:g} (dense {dense['perplexity']:.2f})",
                    one.label,
                )
            )
        parts.append(Part(one.label, lead, tuple(charts)))
    return _section("pareto", parts)


def _stability(inputs: Inputs, most: int, tiles: list[Tile]) -> list[Section | None]:
    every = inputs.stabilities
    sections: list[Section | None] = []
    for along in ("depth", "sequence"):
        chosen = [one for one in every if one.data["along"] == along]
        parts: list[Part] = []
        for one in chosen:
            with readable(one.path, "stability.json", "stability"):
                limits = texts.colour_limits([other.data for other in chosen])
                parts += _stability_parts(one, limits, most, tiles)
        sections.append(_section(along, parts))
    return sections


def _stability_parts(
    one: Found[Mapping[str, Any]], limits: tuple[float, float], most: int, tiles: list[Tile]
) -> list[Part]:
    data, along = one.data, one.data["along"]
    prompts = data["prompts"]
    mean = sum(prompt["metric"] for prompt in prompts) / len(prompts)
    unit = data["unit"].replace("1 / ", "per ")
    way = "decay" if mean < 0 else "grow"
    tiles.append(Tile(signed(mean), f"{unit}: small perturbations {way} along {along}", _subject(one)))
    lead = f"{data['model']}, {data['exponents']} directions, mean over {len(prompts)} prompts {signed(mean)} {unit}."
    left_out = len(prompts) - most
    notes = (f"{left_out} more prompts are not shown here; --texts shows more.",) if left_out > 0 else ()
    shown = tuple(texts.texts({**data, "prompts": prompts[:most]}, limits))
    charts: tuple[Lines, ...] = (views.growth(data),)
    if along == "depth":
        charts += (views.potential_by_layer(data),)
    parts = [Part(_subject(one), lead, texts=shown, notes=notes), Part(f"{one.label}: growth", charts=charts)]
    if along == "depth":
        spectra = (
            "Each small picture is a prompt. Above 0 a layer stretches perturbations in that direction; below 0 it "
        )
        spectra += "shrinks them. The strongest line is the most expanding direction."
        parts.append(Part(f"{one.label}: exponent spectra by depth", spectra, tuple(views.spectra(data))))
    return parts


def _subject(one: Found[Mapping[str, Any]]) -> str:
    """The measured model, and the label of its results."""
    return f"{Path(str(one.data['model'])).name} ({one.label})"


def _training(inputs: Inputs, tiles: list[Tile]) -> Section | None:
    parts = []
    for one in inputs.trainings:
        with readable(one.path, "metrics.jsonl", "distil or train"):
            charts = views.training(one.data)
            lead = ""
            for chart in charts:
                first, last = (chart.series[0].y[place] for place in (0, -1))
                lead += f"{chart.series[0].name.capitalize()} from {number(first)} to {number(last)}. "
                if chart.series[0].name == "perplexity":
                    tiles.append(Tile(number(last), f"perplexity after training (before: {number(first)})", one.label))
        parts.append(Part(one.label, lead.strip(), tuple(charts)))
    return _section("training", parts)


def _samples(samples: Sequence[Sample]) -> Section | None:
    return _section("samples", [Part("Continuations", samples=tuple(samples))] if samples else [])


def made_by(command: str, versions: Sequence[tuple[str, str]], inputs: Inputs) -> Section:
    """How the report and its inputs were made: commands, versions and settings."""
    parts = [
        Part("This report", code=command),
        Part("Versions", settings=tuple(versions)),
    ]
    for model in inputs.models:
        parts.append(Part(f"Settings of {model.label}", settings=_model_settings(model)))
    for one in inputs.comparisons:
        parts.append(
            Part(f"Settings of {one.label}", settings=settings_rows({"path": one.path, **one.data["settings"]}))
        )
    for one in inputs.stabilities:
        kept = {name: value for name, value in one.data.items() if name != "prompts"}
        rows = settings_rows({"path": one.path, **kept, "prompts": len(one.data["prompts"])})
        parts.append(Part(f"Settings of {one.label}", settings=rows))
    for run in inputs.trainings:
        rows = settings_rows({"path": run.path, "lines of metrics": len(run.data)})
        parts.append(Part(f"Settings of {run.label}", settings=rows))
    return Section("made", *TITLES["made"], how("made"), tuple(parts))


def _section(key: str, parts: Sequence[Part]) -> Section | None:
    """A section with its explanation; None if there is nothing to show."""
    return Section(key, *TITLES[key], how(key), tuple(parts)) if parts else None


def _model_settings(model: Found[Inspection]) -> tuple[tuple[str, str], ...]:
    c = model.data.config
    shape = {
        "architecture": c.architecture,
        "layers": c.num_layers,
        "width": c.embed_dim,
        "heads": c.num_heads,
        "key-value heads": c.num_kv_heads,
        "MLP width": c.mlp_dim,
        "vocabulary": c.vocab_size,
    }
    return settings_rows({"path": model.path, **(model.data.conversion or {}), **shape})
