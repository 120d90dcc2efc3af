"""config.json as ngc-jax writes and reads it: that of a dense Hugging Face architecture, with a section of our own.

A model that is not of the plain architecture has a type of its own, so that no other program loads it as the plain one.
The original type is stored in the section, and is restored when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig, text_config
from ngc_jax.models.families import family_of
from ngc_jax.models.families.encoders import ENCODERS
from ngc_jax.models.quantised import ENTRIES
from ngc_jax.models.quantised_tensors import ENTRY

SECTION = "ngc"
MODEL_TYPE = "ngc"
ARCHITECTURE = "NgcForCausalLM"
ENCODER_ARCHITECTURE = "NgcImageEncoder"
# 1: without the types of the dense architecture, which were in their usual place. 3: quantised matrices, in the models
# that have some.
FORMAT_VERSION = 3
_WITHOUT_QUANTISED = 2
# Entries that described the original files, and do not describe the written ones.
_STALE = (*ENTRIES, "auto_map", "_name_or_path", "transformers_version")


def split_config(stored: Mapping[str, Any], source: str) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Split a config.json into its two parts.

    Args:
        stored: The whole file.
        source: The user's name of the model, for messages.

    Returns:
        The config.json of the dense architecture (of a multimodal model, of its text decoder), and our section; None in
        a file that we did not write, or that needed none.

    Raises:
        UsageError: If our section is damaged, or of a later version than this.
    """
    hf_config = dict(stored)
    section = hf_config.pop(SECTION, None)
    if section is not None and not isinstance(section, Mapping):
        raise UsageError(f"config.json of {source} has a section {SECTION!r} without a plan; convert the model again")
    version = 1 if section is None else section.get("format", 1)
    if type(version) is not int or version > FORMAT_VERSION:
        raise UsageError(
            f"config.json of {source} is of format {version!r}, this ngc-jax reads up to {FORMAT_VERSION}; install a "
            "newer ngc-jax"
        )
    if hf_config.get("model_type") == MODEL_TYPE:
        if section is None or not isinstance(section.get("model_type"), str):
            raise UsageError(
                f"config.json of {source} is of type {MODEL_TYPE!r} and does not say which architecture it was made "
                "from; convert the model again"
            )
        hf_config["model_type"] = section["model_type"]
        hf_config.pop("architectures", None)
        if section.get("architectures") is not None:
            hf_config["architectures"] = section["architectures"]
    return dict(text_config(hf_config)), section


def join_config(
    hf_config: Mapping[str, Any],
    config: DecoderConfig,
    plan: Plan | None,
    conversion: Mapping[str, Any] | None,
    quantised: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json to write; the inverse of `split_config`.

    A dense model, and one with pruned neurons and no other change, keeps its own type.

    Args:
        hf_config: That of the dense architecture.
        config: The same, read.
        plan: The groups; None for a dense model.
        conversion: How the model was made, if it was converted.
        quantised: Its quantised matrices, from `describe_quantised`.
    """
    whole = {name: value for name, value in hf_config.items() if name not in _STALE}
    if not whole.get("architectures"):
        # Of a model trained from scratch; some programs choose their code by it.
        whole["architectures"] = [family_of(config.architecture).model_class]
    version = FORMAT_VERSION if quantised else _WITHOUT_QUANTISED
    section: dict[str, Any] = {"format": version, **(conversion or {})}
    if quantised:
        section[ENTRY] = dict(quantised)
    if not is_plain(config, plan, quantised=bool(quantised)):
        section |= {"model_type": whole.get("model_type"), "architectures": whole.get("architectures")}
        whole |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE if config.causal else ENCODER_ARCHITECTURE]}
    elif plan is None:
        return whole
    if plan is not None:
        section["plan"] = plan.to_json()
    return {**whole, SECTION: section}


def is_plain(config: DecoderConfig, plan: Plan | None, *, quantised: bool = False) -> bool:
    """Whether the plain architecture computes the same function as the model, and reads its tensors."""
    encoder = ENCODERS.get(config.architecture)
    if plan is not None and plan.removed and encoder is not None and not encoder.free_width:
        return False
    return (plan is None or not plan.groups) and config.iterations == 1 and not quantised


def conversion_of(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How a model was made, from our section; None if it was not converted."""
    if section is None or "plan" not in section:
        return None
    own = ("plan", "format", "model_type", "architectures", ENTRY)
    return {name: value for name, value in section.items() if name not in own}


def read_plan(section: Mapping[str, Any] | None, config: DecoderConfig, source: str) -> Plan | None:
    """The plan in our section of config.json; None if there is none.

    Raises:
        UsageError: If the plan is not readable or names a block that the model does not have.
    """
    if section is None or (isinstance(section, Mapping) and "plan" not in section and "model_type" in section):
        return None
    if not isinstance(section, Mapping) or "plan" not in section:
        raise UsageError(f"config.json of {source} has a section {SECTION!r} without a plan; convert the model again")
    plan = Plan.from_json(section["plan"])
    known = {block.name: block for block in config.blocks()}
    for block in plan.blocks():
        if known.get(block.name) != block:
            raise UsageError(
                f"the plan of {source} has {block}, which its config.json does not; convert the model again"
            )
    return plan
