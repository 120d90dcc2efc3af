"""A report as a library function: directories in, one HTML page out."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ngc_jax.errors import UsageError
from ngc_jax.files import check_target
from ngc_jax.models.sources import open_source
from ngc_jax.reporting.blocks import block_errors
from ngc_jax.reporting.inputs import Inputs, read_inputs
from ngc_jax.reporting.page import Sample, render, write_page
from ngc_jax.reporting.sections import made_by, make_sections


@dataclass(frozen=True)
class Report:
    """A written page.

    Attributes:
        file: The page.
        size: In bytes.
        sections: Keys of its sections.
        titles: Their titles.
    """

    file: Path
    size: int
    sections: tuple[str, ...]
    titles: tuple[str, ...]


def report(
    sources: Sequence[str],
    out: str | Path,
    *,
    title: str | None = None,
    dense: str | None = None,
    texts: int = 24,
    samples: Callable[[Inputs], Sequence[Sample]] | None = None,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Write one HTML page, which fetches nothing, on models, comparisons, stability runs and training runs.

    Args:
        sources: Directories: saved models, and the outputs of compare, stability, distil and train.
        out: The page; replaced if it exists.
        title: Of the page; the models' names if None.
        dense: The dense model that compact models' blocks are compared with.
        texts: Number of prompts of each stability run that are shown token by token.
        samples: Called with the inputs once they are known to be valid; returns the models' continuations of prompts.
        command: Shown as the command that made the page.
        progress: Called with (stage, done, total).

    Raises:
        UsageError: If a source has nothing to report on or is damaged, or the page cannot be written.

    Example:
        >>> from ngc_jax import save_model
        >>> report([str(save_model(compact, "reported"))], "report.html").file.name
        'report.html'
    """
    if Path(out).is_dir():
        raise UsageError(f"{out} is a directory; give the name of a file, such as {Path(out) / 'report.html'}")
    check_target(str(out), "out")
    inputs = read_inputs(sources)
    sections_of = partial(make_sections, inputs, dense=dense, most_texts=texts)
    # All errors in the files are found before a model is loaded.
    sections_of(errors={}, samples=())
    errors = _errors(inputs, dense, progress)
    tiles, sections = sections_of(errors=errors, samples=() if samples is None else samples(inputs))
    sections.append(made_by(command, versions(), inputs))
    size = write_page(render(title or _title(inputs), _lead(inputs), tiles, sections), Path(out))
    return Report(Path(out), size, tuple(one.key for one in sections), tuple(one.title for one in sections))


def _errors(
    inputs: Inputs, dense: str | None, progress: Callable[[str, int, int], None] | None
) -> dict[str, dict[str, float]]:
    """By path of each compact model, the distances of its blocks from the dense model's."""
    found: dict[str, dict[str, float]] = {}
    compact = [model for model in inputs.models if model.data.plan is not None]
    if dense is None or not compact:
        return found
    with open_source(dense) as source:
        for model in compact:
            named = None if progress is None else partial(progress, model.label)
            with open_source(model.path) as own:
                found[model.path] = block_errors(own, source, progress=named)
    return found


def versions() -> list[tuple[str, str]]:
    """The relevant versions, the machine and the time."""
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
    """The models' names, or those of all other inputs if there are no models."""
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
    named = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
    return f"A report on {' and '.join([', '.join(named[:-1]), named[-1]] if len(named) > 1 else named)}."
