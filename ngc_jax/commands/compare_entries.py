"""The entries of a comparison: the conversions that its variants ask for, and which of them share a fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.commands.compare import CompareConfig
    from ngc_jax.conversion.methods import Recipe
    from ngc_jax.models.config import DecoderConfig

SECTIONS = ("methods", "levers", "topologies", "texts")
# A calibration text, or a mixture; see `conversion.mixtures`.
Text = str | tuple[str, ...]
_DEFAULT_VARIANTS = {name: {"method": name} for name in ("svd_llm", "ngc")}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One conversion of a comparison.

    Attributes:
        variant: Its name.
        recipe: The conversion.
        text: Its calibration text, or a mixture.
        section: Section of the results that shows it.
        cost: Whether its decoding speed is measured.
        own_process: Whether a conversion is timed in a separate process.
    """

    variant: str
    recipe: Recipe
    text: Text
    section: str
    cost: bool
    own_process: bool


def entries_of(config: CompareConfig) -> list[Entry]:
    """All entries in order of sections and variants.

    Raises:
        UsageError: If a variant is unknown or has an unknown option.
    """
    from ngc_jax.conversion.methods import Recipe
    from ngc_jax.conversion.registry import option_types

    variants = config.variants or _DEFAULT_VARIANTS
    levers = {"method", *option_types()} - {"rank"}
    others: dict[str, Callable[[Any], Any]] = {"keep": list, "text": _text, "section": str, "cost": bool}
    unknown = sorted(set(config.only or []) - set(variants))
    if unknown:
        raise UsageError(f"there is no variant {unknown[0]!r}; expected one of {', '.join(variants)}")
    entries = []
    for name, options in variants.items():
        if config.only and name not in config.only:
            continue
        wrong = sorted(set(options) - levers - set(others))
        if wrong:
            raise UsageError(
                f"variant {name} has no option {wrong[0]!r}; expected {', '.join(sorted(levers | set(others)))}"
            )
        section = options.get("section", "methods")
        if section not in SECTIONS:
            raise UsageError(f"variant {name} is in section {section!r}; expected one of {', '.join(SECTIONS)}")
        for index, keep in enumerate(options.get("keep") or config.keep or [0.8]):
            chosen: dict[str, Any] = {key: value for key, value in options.items() if key in levers}
            recipe = Recipe(**chosen, keep=keep)
            cost = bool(options.get("cost"))
            text = _text(options.get("text", config.text))
            entries.append(Entry(name, recipe, text, section, cost, cost and index == 0))
    return sorted(entries, key=lambda entry: SECTIONS.index(entry.section))


def _text(given: Any) -> Text:
    """A text, or a mixture that can be compared with others.

    Raises:
        UsageError: If shares are wrong.
    """
    from ngc_jax.conversion.mixtures import sources_of

    if not sources_of(given):
        return str(given if isinstance(given, str) else given[0])
    return (given,) if isinstance(given, str) else tuple(given)


def input_digests(config: CompareConfig, entries: Iterable[Entry]) -> dict[Text, Any]:
    """Digests of the compared model and, by name, of the texts that are files."""
    from ngc_jax.conversion.mixtures import sources_of
    from ngc_jax.models.fingerprint import fingerprint
    from ngc_jax.models.sources import open_source

    with open_source(config.model) as source:
        digests: dict[Text, Any] = {"model": fingerprint(source)}
    texts: set[Text] = {config.evaluation_text, *(entry.text for entry in entries)}
    for text in texts:
        if isinstance(text, str):
            digests[text] = file_digest(text)
        else:
            digests[text] = [file_digest(source.name) for source in sources_of(text)]
    return digests


def file_digest(text: str) -> str | None:
    """The digest of a text that is a file; None for another."""
    file = Path(text).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def window_of(config: CompareConfig) -> int:
    """Tokens in a window: the given number, or one that suits the model."""
    from ngc_jax.commands.convert import model_window
    from ngc_jax.models.config import DecoderConfig
    from ngc_jax.models.saved_config import split_config
    from ngc_jax.models.sources import open_source

    with open_source(config.model) as source:
        hf_config, _ = split_config(source.config, config.model)
    return model_window(config.window, DecoderConfig.from_hf(hf_config).max_length)


def check_budgets(config: DecoderConfig, entries: Iterable[Entry]) -> None:
    """Refuse keep ratios that no ranks reach, before anything is measured.

    Raises:
        UsageError: If one is too low.
    """
    from ngc_jax.conversion.pipeline import check_conversion

    for entry in entries:
        check_conversion(config, entry.recipe.chain, entry.recipe.keep)


def measure_cost(config: CompareConfig, entry: Entry, window: int) -> dict[str, float]:
    """Convert in a new process; its seconds and peak memory."""
    from ngc_jax.commands.conversion_options import flags_of

    recipe, c = entry.recipe, config
    with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
        flags = [
            c.model,
            "--out",
            str(Path(directory) / "model"),
            "--text",
            *([entry.text] if isinstance(entry.text, str) else entry.text),
            "--window",
            str(window),
        ]
        flags += [] if c.calibration_tokens is None else ["--calibration-tokens", str(c.calibration_tokens)]
        flags += ["--bos", c.bos, *([] if c.tokenizer is None else ["--tokenizer", c.tokenizer])]
        flags += ["--gradient-tokens", str(c.gradient_tokens), "--propagation-tokens", str(c.propagation_tokens)]
        flags += [*flags_of(recipe), "--json", str(Path(directory) / "summary.json")]
        command = [sys.executable, "-m", "ngc_jax.cli", "convert", *flags]
        returned = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if returned != 0:
            raise UsageError(f"converting {entry.variant} in its own process failed with {returned}")
        summary = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))
    return {"seconds": summary["seconds"], "peak_bytes": summary["peak_bytes"]}
