"""The cells of one model: each is one conversion, or the dense model, with its perplexities and its tasks.

Every part of a cell (the saved model, a perplexity, a task) has a place of its own, whose name stands for everything it
depends on. What is there is not made again, however the program ended.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.arena.retained import chance_of
from experiments.arena.settings import DENSE, Arena, Problem, digest, slug, text_digests
from ngc_jax.commands.console import console, progress_bar
from ngc_jax.commands.convert import calibration_tokens, model_window, text_tokens
from ngc_jax.conversion import Calibration, convert
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.measurement_cache import MeasurementCache
from ngc_jax.conversion.methods import Recipe
from ngc_jax.conversion.pipeline import check_conversion
from ngc_jax.conversion.state import Needs
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.pairs import read_run
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.evaluation.run_tasks import RunOptions, run_task
from ngc_jax.evaluation.scores import Sum
from ngc_jax.files import write_json
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.fingerprint import fingerprint
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import in_dtype, save_model, tensor_bytes
from ngc_jax.models.saved_config import split_config
from ngc_jax.models.sources import open_source
from ngc_jax.models.tokenizer import Tokenizer

# Files of a cell and of its tasks. That of a saved model is written after it and removed before it.
_ABOUT, _SUMMARY, _COMPLETE = "conversion.json", "summary.json", "model.json"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the results.

    Attributes:
        method: "dense", or the method's name.
        keep: Keep ratio.
        place: Directory of its parts.
        recipe: The conversion; None for the dense model.
    """

    method: str
    keep: float
    place: Path
    recipe: Recipe | None

    @property
    def name(self) -> str:
        """For messages."""
        return self.method if self.recipe is None else f"{self.method} {self.keep:g}"


class Model:
    """One model of an arena, and its cells.

    Attributes:
        impossible: Why a conversion cannot be made, by its name.
        skipped: Why a task is not given to converted models, by its name.
        failed: Why a cell has no results, by its name; it is tried again by the next run.
    """

    def __init__(self, name: str, arena: Arena) -> None:
        """Look at the model's config and files; nothing is loaded."""
        self.name, self.arena = name, arena
        self.skipped: dict[str, str] = {}
        self.impossible: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        with open_source(name) as source:
            hf_config, section = split_config(source.config, name)
            if section is not None and "plan" in section:
                raise UsageError(f"{name} is a compact model already; compare the dense model it was made from")
            self.config = DecoderConfig.from_hf(hf_config)
            self._key = [fingerprint(source), arena.running.dtype, arena.running.param_dtype]
        texts = arena.texts
        self.window = model_window(texts.window, self.config.max_length)
        numbers = (texts.calibration_tokens, texts.gradient_tokens, texts.propagation_tokens, self.window)
        self._measured = [text_digests(texts.calibration), numbers]
        self.place = arena.out / "cells" / slug(name)
        self.cells = [Cell(DENSE, 1.0, self.place / f"dense-{digest(self._key)}", None)]
        for (method, keep), recipe in arena.recipes().items():
            key = [self._key, self._measured, keep, recipe.chain.describe(), arena.running.store_dtype]
            cell = Cell(method, keep, self.place / f"{slug(method)}-{keep:g}-{digest(key)}", recipe)
            try:
                check_conversion(self.config, recipe.chain, keep)
            except UsageError as error:
                self.impossible[cell.name] = str(error)
            else:
                self.cells.append(cell)
        self._fits = FitCache()

    @cached_property
    def dense(self) -> LanguageModel:
        """The model itself."""
        with progress_bar("load") as bar:
            return self._load(self.name, bar)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        with open_source(self.name) as source:
            return source.tokenizer()

    @cached_property
    def _statistics(self) -> Path:
        return self.arena.out / "statistics" / f"{slug(self.name)}-{digest(self._key, self._measured)}"

    @cached_property
    def _calibration(self) -> Calibration:
        texts = self.arena.texts
        tokens = calibration_tokens(
            self.dense,
            self.tokenizer,
            texts.calibration,
            texts.calibration_tokens,
            window=self.window,
            prefix=self.tokenizer.prefix("auto"),
        )
        return Calibration.of(
            self.dense,
            tokens,
            window=self.window,
            gradient_tokens=texts.gradient_tokens,
            propagation_tokens=texts.propagation_tokens,
        )

    @cached_property
    def _measurements(self) -> MeasurementCache | None:
        """The statistics that all conversions need together, measured once."""
        if self.arena.running.own_statistics:
            return None
        needs = Needs()
        for cell in self.cells:
            if cell.recipe is not None:
                needs |= cell.recipe.chain.needs(self.config, cell.keep, self._calibration)
        with progress_bar() as bar:
            return MeasurementCache(
                self._statistics, self.dense, self._calibration, needs, self._fits, lambda stage, *a: bar(*a, stage)
            )

    def run(self, finished: Callable[[], None]) -> None:
        """All missing parts of all cells.

        Args:
            finished: Called after each cell that had any.
        """
        try:
            with self._fits:
                for cell in self.cells:
                    done = self._finished(cell)
                    if not done:
                        self._try_cell(cell)
                    if cell.recipe is None:
                        self._skip_tasks(cell)
                    elif not self.arena.running.keep_models:
                        (cell.place / _COMPLETE).unlink(missing_ok=True)
                        shutil.rmtree(cell.place / "model", ignore_errors=True)
                    if not done:
                        finished()
                        jax.clear_caches()  # programs are compiled for its ranks alone
            shutil.rmtree(self._statistics, ignore_errors=True)
        finally:
            for held in ("dense", "_measurements"):
                self.__dict__.pop(held, None)

    def problems(self, cell: Cell) -> list[Problem]:
        """The tasks of a cell."""
        return [one for one in self.arena.problems if cell.recipe is None or one.name not in self.skipped]

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell has so far; None without anything."""
        if not (cell.place / _ABOUT).is_file():
            return None
        row = {"model": self.name, "method": cell.method, "keep": cell.keep, **_read(cell.place / _ABOUT)}
        row["perplexity"] = {
            text: _read(file) for text in self.arena.texts.evaluation if (file := self._text_file(cell, text)).is_file()
        }
        row["tasks"] = {}
        for problem in self.problems(cell):
            place = self._task_place(cell, problem)
            if (place / _SUMMARY).is_file():
                scores = {name: list(score.values) for name, score in read_run(place).scores.items()}
                row["tasks"][problem.name] = {**_read(place / _SUMMARY), "shown": problem.score, "values": scores}
        return row

    def _skip_tasks(self, cell: Cell) -> None:
        """Leave out tasks that the dense model fails."""
        for problem in self.arena.problems:
            score = read_run(self._task_place(cell, problem)).scores[problem.score].mean
            if score < problem.least:
                self.skipped[problem.name] = (
                    f"the dense model's {problem.score} is {100 * score:.1f} %, below {100 * problem.least:g} %"
                )

    def _finished(self, cell: Cell) -> bool:
        texts = all(self._text_file(cell, text).is_file() for text in self.arena.texts.evaluation)
        tasks = all((self._task_place(cell, problem) / _SUMMARY).is_file() for problem in self.problems(cell))
        return texts and tasks and (cell.place / _ABOUT).is_file()

    def _try_cell(self, cell: Cell) -> None:
        """Run a cell; a conversion that cannot be made, or cannot be evaluated, does not stop the others."""
        try:
            self._run_cell(cell)
        except UsageError as error:
            if cell.recipe is None:
                raise
            self.failed[cell.name] = str(error)
            console.print(f"{self.name}, {cell.name} failed: {error}")

    def _run_cell(self, cell: Cell) -> None:
        cell.place.mkdir(parents=True, exist_ok=True)
        model = self.dense if cell.recipe is None else self._converted(cell)
        if cell.recipe is None:
            write_json(cell.place / _ABOUT, _counts(model, self.dense))
        fast = inference_model(model)
        del model
        for text in self.arena.texts.evaluation:
            if not (file := self._text_file(cell, text)).is_file():
                self._measure_text(cell, fast, text, file)
        for problem in self.problems(cell):
            if not (self._task_place(cell, problem) / _SUMMARY).is_file():
                self._run_task(cell, fast, problem)

    def _converted(self, cell: Cell) -> LanguageModel:
        """The conversion of a cell: that which is saved, or a new one, saved and loaded."""
        place, about = cell.place / "model", cell.place / _ABOUT
        if not (cell.place / _COMPLETE).is_file():
            assert cell.recipe is not None
            measurements, started = self._measurements, time.perf_counter()
            saved_seconds = self._fits.saved_seconds
            with progress_bar(cell.name) as bar:
                compact = convert(
                    self.dense,
                    cell.recipe,
                    self._calibration,
                    measurements=measurements,
                    progress=lambda stage, *a: bar(*a, stage),
                )
            # The time of a separate conversion: includes the fit that it shares with other keep ratios.
            seconds = time.perf_counter() - started + self._fits.saved_seconds - saved_seconds
            counts = _counts(compact, self.dense) | {"seconds": seconds}
            if self.arena.running.store_dtype is not None:
                compact = in_dtype(compact, self.arena.running.store_dtype)
            details = {"method": cell.method, "keep": cell.keep, "source": self.name}
            save_model(dataclasses.replace(compact, conversion=details), place, overwrite=True)
            del compact
            write_json(about, counts | {"bytes": tensor_bytes(place)})
            write_json(cell.place / _COMPLETE, {"model": place.name})
        return self._load(str(place))

    def _measure_text(self, cell: Cell, model: LanguageModel, text: str, file: Path) -> None:
        tokens = self._tokens(text)
        with progress_bar(f"{cell.name}, {Path(text).name}") as bar:
            found = measure_perplexity(
                model,
                tokens,
                tokenizer=self.tokenizer,
                window=self.window,
                batch_size=self.arena.running.batch_size,
                progress=bar,
            )
        write_json(file, dataclasses.asdict(found))
        console.print(f"{self.name}, {cell.name}: perplexity {found.perplexity:.3f} on {Path(text).name}")

    def _tokens(self, text: str) -> np.ndarray:
        texts = self.arena.texts
        return text_tokens(text, self.tokenizer, texts.skip(text), texts.max_tokens)

    def _run_task(self, cell: Cell, model: LanguageModel, problem: Problem) -> None:
        place = self._task_place(cell, problem)
        with progress_bar(f"{cell.name}, {problem.name}") as bar:
            result = run_task(
                model,
                problem.spec,
                problem.documents,
                place,
                settings={"cell": cell.place.name},
                how=RunOptions(self.arena.running.batch_size),
                progress=lambda stage, done, total: bar(done, total, stage),
            )
        chance = chance_of(problem.spec, problem.documents, self.tokenizer)
        write_json(place / _SUMMARY, {**result.summary(), "chance": list(chance)})
        score: Sum = result.scores[problem.score]
        console.print(f"{self.name}, {cell.name}: {problem.score} {100 * score.mean:.1f} % on {problem.name}")

    def _text_file(self, cell: Cell, text: str) -> Path:
        key = digest(text_digests(text), self.arena.texts.skip(text), self.arena.texts.max_tokens, self.window)
        return cell.place / f"perplexity-{slug(Path(text).name)}-{key}.json"

    def _task_place(self, cell: Cell, problem: Problem) -> Path:
        return cell.place / f"{slug(problem.name)}-{problem.key(self.arena.running.batch_size)}"

    def _load(self, name: str, progress: Any = None) -> LanguageModel:
        running = self.arena.running
        return load_model(name, dtype=running.dtype, param_dtype=running.param_dtype, progress=progress)


def _counts(model: LanguageModel, dense: LanguageModel) -> dict[str, Any]:
    """Stored parameters: all of them, and of the grouped blocks the share that is kept."""
    ratio = 1.0 if model.plan is None else model.plan.keep_ratio()
    return {
        "parameters": model.count_parameters(),
        "dense_parameters": dense.count_parameters(),
        "keep_ratio": ratio,
    }


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
