"""The inputs of a report: directories that other commands wrote, recognised by their contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from ngc_jax.errors import UsageError
from ngc_jax.files import parse_json
from ngc_jax.models.inspect import Inspection, inspect_model
from ngc_jax.models.sources import open_source

T = TypeVar("T")
_LOOKED_FOR = (
    "config.json and safetensors (a model), results.json (ngc-jax compare), stability.json (ngc-jax stability) or "
    "metrics.jsonl (ngc-jax distil or train)"
)


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
    """One thing to report on.

    Attributes:
        path: Its directory, as the user gave it.
        label: A short name, unique among its kind.
        data: Its contents.
    """

    path: str
    label: str
    data: T


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All inputs of a report.

    Attributes:
        models: Model directories.
        comparisons: results.json of `ngc-jax compare`.
        stabilities: stability.json of `ngc-jax stability`.
        trainings: The lines of metrics.jsonl of `ngc-jax distil` and `train`.
    """

    models: tuple[Found[Inspection], ...]
    comparisons: tuple[Found[Mapping[str, Any]], ...]
    stabilities: tuple[Found[Mapping[str, Any]], ...]
    trainings: tuple[Found[Sequence[Mapping[str, Any]]], ...]


def read_inputs(sources: Sequence[str]) -> Inputs:
    """Read the contents of some directories, without reading tensors.

    A training run's finished model, in its directory `model`, is included too.

    Raises:
        UsageError: If a source is not a directory, has nothing to report on, or something in it cannot be read.
    """
    paths: dict[str, list[str]] = {"model": [], "results.json": [], "stability.json": [], "metrics.jsonl": []}
    for source in sources:
        for kind, path in _recognise(source):
            same = [Path(other).resolve() for other in paths[kind]]
            if Path(path).resolve() not in same:
                paths[kind].append(path)
    read: dict[str, list[Any]] = {kind: [_READERS[kind](path) for path in found] for kind, found in paths.items()}
    return Inputs(*(tuple(_labelled(paths[kind], read[kind])) for kind in paths))


@contextmanager
def readable(path: str, file: str, command: str) -> Iterator[None]:
    """Convert errors in reading a command's JSON to a UsageError that names the file."""
    try:
        yield
    except UsageError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{Path(path) / file} is not what ngc-jax {command} writes ({reason}); run that command again"
        ) from error


def _recognise(source: str) -> list[tuple[str, str]]:
    """The kinds of contents of a directory, and where each is."""
    directory = Path(source)
    if not directory.is_dir():
        raise UsageError(f"{source} is not a directory; give one with {_LOOKED_FOR}")
    found = []
    for place in (directory, directory / "model"):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            found.append(("model", str(place)))
    if found and found[-1][1] != str(directory) and not (directory / "metrics.jsonl").is_file():
        found.pop()  # a directory that only contains a model is not a training run
    found += [
        (name, source) for name in ("results.json", "stability.json", "metrics.jsonl") if (directory / name).is_file()
    ]
    if not found:
        raise UsageError(f"{source} has nothing to report on; looked for {_LOOKED_FOR}")
    return found


def _labelled(paths: Sequence[str], data: Sequence[Any]) -> Iterator[Found[Any]]:
    """Name each by the last part of its path, or by the whole path if that is not unique."""
    names = [_name(path) for path in paths]
    for path, name, one in zip(paths, names, data, strict=True):
        yield Found(path, name if names.count(name) == 1 else path, one)


def _name(path: str) -> str:
    whole = Path(path).resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name == "model" else whole.name


def _model(path: str) -> Inspection:
    with open_source(path) as source:
        return inspect_model(source)


def _results(path: str) -> Mapping[str, Any]:
    data = _json(Path(path) / "results.json")
    with readable(path, "results.json", "compare"):
        missing = {"settings", "dense", "entries"} - set(data)
        if missing or not isinstance(data["entries"], list):
            raise ValueError(f"no {', '.join(sorted(missing)) or 'list of entries'}")
    return data


def _stability(path: str) -> Mapping[str, Any]:
    data = _json(Path(path) / "stability.json")
    with readable(path, "stability.json", "stability"):
        if data["along"] not in ("depth", "sequence") or not data["prompts"]:
            raise ValueError("no prompts along depth or sequence")
    return data


def _metrics(path: str) -> Sequence[Mapping[str, Any]]:
    file = Path(path) / "metrics.jsonl"
    rows = [_parse(line, f"{file}, line {number}") for number, line in enumerate(_read(file).splitlines(), 1) if line]
    with readable(path, "metrics.jsonl", "distil or train"):
        if not rows or not all("step" in row for row in rows):
            raise ValueError("a line without a step, or no line at all")
    return rows


_READERS: Mapping[str, Any] = {
    "model": _model,
    "results.json": _results,
    "stability.json": _stability,
    "metrics.jsonl": _metrics,
}


def _json(file: Path) -> Mapping[str, Any]:
    return _parse(_read(file), str(file))


def _parse(text: str, where: str) -> Mapping[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({error}); write it again with the command that made it") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where} does not hold an object; write it again with the command that made it")
    return data


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); check it") from error
