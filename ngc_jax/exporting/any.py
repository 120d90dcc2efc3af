"""Export in every form by one function."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.exporting.gguf import export_gguf
from ngc_jax.exporting.grouped import export_grouped
from ngc_jax.exporting.huggingface import export_huggingface
from ngc_jax.models.config import language_only
from ngc_jax.models.families.encoders import is_encoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.save import save_model
from ngc_jax.models.saved_config import split_config
from ngc_jax.models.sources import Source, open_source

FORMS = ("hf", "hf-grouped", "gguf")


def export(
    model: str | Path | LanguageModel | Source, out: str | Path, *, to: str = "hf", **options: Any
) -> dict[str, Any]:
    """Write a model, dense or compact, in a form that other programs load.

    Args:
        model: A loaded model, an open source, or what `load_model` takes: a directory, a hub id, a GGUF file, a wheel.
        out: The directory or file to create.
        to: `hf`, a plain Hugging Face directory with groups folded into dense weights; `hf-grouped`, one that keeps the
            groups and runs in transformers with `trust_remote_code=True`; `gguf`, a file for llama.cpp, folded.
        options: `dtype` (float32, float16, bfloat16) of hf and hf-grouped; `type` (q8_0 and others) of gguf;
            `overwrite` and `progress` of all.

    Returns:
        A summary: what was written, its parameters and bytes, and whether groups were folded.

    Raises:
        UsageError: If there is no such form, it cannot represent the model, or the output cannot be written.

    Example:
        >>> export(compact, "plain", to="hf")["folded"]
        True
        >>> export("smollm2-0.8", "smollm2-0.8.gguf", to="gguf", type="q8_0")  # doctest: +SKIP
    """
    if to == "gguf-grouped":
        raise UsageError(
            "no program that reads GGUF has groups of neurons; export to gguf, which folds them into dense weights, or "
            "convert in form dense for a file that is smaller too"
        )
    if to not in FORMS:
        raise UsageError(f"there is no form {to!r} of an export; expected one of {', '.join(FORMS)}")
    known = {"overwrite", "progress", "type" if to == "gguf" else "dtype"}
    if wrong := sorted(name for name, value in options.items() if name not in known and value is not None):
        raise UsageError(f"an export to {to} has no option {wrong[0]!r}; expected {', '.join(sorted(known))}")
    writers: dict[str, Any] = {"hf": export_huggingface, "hf-grouped": export_grouped, "gguf": export_gguf}
    write = writers[to]
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, LanguageModel):
        language_only(model.config, "an export")
        with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
            saved = save_model(dataclasses.replace(model), Path(directory) / "model")
            with open_source(str(saved)) as source:
                source.name = model.name
                return write(source, out, **given)
    if isinstance(model, str | Path):
        with open_source(str(model)) as source:
            _refuse_encoder(source)
            return write(source, out, **given)
    _refuse_encoder(model)
    return write(model, out, **given)


def _refuse_encoder(source: Source) -> None:
    """Refuse an image encoder, which runs in ngc-jax, or in transformers if it has no groups, as it was saved."""
    if is_encoder(split_config(source.config, source.name)[0]):
        raise UsageError(
            f"{source.name} is an image encoder, which is not exported: one without groups is a plain model as it was "
            "saved, one with groups runs in ngc-jax only"
        )
