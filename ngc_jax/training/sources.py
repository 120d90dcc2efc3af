"""Sources of training documents, by name.

A source is named by

- `pydoc`, `pydoc:first-half`, `pydoc:second-half` or the path of a text file: one document (see `ngc_jax.text`);
- the path or glob pattern of .jsonl, .json, .parquet or .txt files, or several of one kind: a row is a document, or,
  if there are several .txt files, each file is;
- `hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, a dataset of the Hugging Face hub or a local directory of one: a row is a
  document;
- `reasoning-gym:TASK`, procedurally generated questions (https://github.com/open-thought/reasoning-gym): the question
  is the prompt and the answer the text.

A source that is read whole is a sequence of documents. A stream (`streaming`) is never held whole and has no known
length.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.text import read_text
from ngc_jax.training.field_types import check_field_types
from ngc_jax.training.packing import TokenDocument

if TYPE_CHECKING:
    from jaxtyping import Array, Key

    from ngc_jax.models.load import LanguageModel

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_GYM = "reasoning-gym"


@dataclass(frozen=True)
class SourceConfig:
    """A source of documents.

    Args:
        name: The source's name, or a list of files of one kind.
        weight: Its share of the rows, relative to the other sources'.
        column: Column of the text.
        prompt_column: Column of the prompt, if there is one.
        streaming: Read it as needed, repeatedly, and never whole.
        joined: Treat all its rows as one document, joined by newlines.
        skip_tokens: Number of tokens to skip at its start.
        max_tokens: Number of tokens to take after that; all by default.
        size: Number of questions, for reasoning-gym.
        seed: Of the questions.
        arguments: Arguments of the task, for example {"max_digits": 3}.
    """

    name: str | list[str]
    weight: float = 1.0
    column: str = "text"
    prompt_column: str | None = None
    streaming: bool = False
    joined: bool = False
    skip_tokens: int = 0
    max_tokens: int | None = None
    size: int = 10_000
    seed: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError for wrong types, numbers out of range and incompatible options."""
        check_field_types(self)
        if not self.name:
            raise UsageError("a source has no name; give a file, pydoc, hub:NAME or reasoning-gym:TASK")
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"the weight of {self.label} is {self.weight}; expected a number above 0")
        if self.skip_tokens < 0 or (self.max_tokens is not None and self.max_tokens < 1) or self.size < 1:
            raise UsageError(
                f"{self.label}: skip_tokens is {self.skip_tokens}, max_tokens {self.max_tokens} and size {self.size}; "
                "expected at least 0, 1 and 1"
            )
        if self.streaming and (self.skip_tokens or self.max_tokens is not None or self.joined):
            raise UsageError(
                f"{self.label}: skip_tokens, max_tokens and joined need a source that is read whole; set streaming "
                "to false"
            )
        if self.joined and self.prompt_column is not None:
            raise UsageError(f"{self.label}: rows with prompts cannot be joined; leave out joined or prompt_column")
        if self.arguments and not self.label.startswith(f"{_GYM}:"):
            raise UsageError(f"{self.label} takes no arguments; they are for {_GYM}:TASK")

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name if isinstance(self.name, str) else ", ".join(self.name)


@dataclass(frozen=True)
class Document:
    """A text and its prompt, which is read but not predicted."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Stream:
    """Documents that arrive one by one.

    Attributes:
        shards: Number of parts that can be read independently, usually files.
        open_part: From (index, count) to every count-th shard, as a Hugging Face IterableDataset.
        read: From its rows to documents.
        label: The source's name, for messages.
    """

    shards: int
    open_part: Callable[[int, int], Any]
    read: Callable[[Mapping[str, Any]], Document]
    label: str


class TableRows(Sequence[Document]):
    """The rows of a Hugging Face dataset as documents; read from its file on disk when requested."""

    def __init__(self, table: Any, read: Callable[[Mapping[str, Any]], Document]) -> None:
        """Wraps a datasets.Dataset; `read` makes a document of a row."""
        self._table, self._read = table, read

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        with _utf8_only():
            return self._read(self._table[index])

    def __iter__(self) -> Iterator[Document]:
        with _utf8_only():
            yield from map(self._read, self._table)


@contextmanager
def _utf8_only() -> Iterator[None]:
    """Tables hold bytes, so that invalid text is found only when a row is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"a row of the data is not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def open_source(config: SourceConfig) -> Sequence[Document] | Stream:
    """Open a source.

    Args:
        config: The source's config.

    Returns:
        Its documents, or a stream of them if `streaming`.

    Raises:
        UsageError: If there is no such source or column, it cannot be read, or it is empty.
    """
    name = config.name if isinstance(config.name, str) else ""
    if name.startswith(f"{_GYM}:"):
        _read_whole(config)
        return _gym(config, name.partition(":")[2])
    if name == "pydoc" or name.startswith("pydoc:"):
        _read_whole(config)
        return [Document(read_text(name))]
    if name.startswith("hub:"):
        return _hub(config, name)
    return _files(config)


def sampled_source(
    model: LanguageModel,
    count: int,
    key: Key[Array, ""],
    *,
    length: int = 1024,
    batch_size: int = 32,
    prefix: Sequence[int] = (),
) -> list[TokenDocument]:
    """Documents that a model generates itself, to train on without any data; see `ngc_jax.models.sample_text`.

    Args:
        model: The model, usually the teacher.
        count: Total number of tokens.
        key: Randomness.
        length: Tokens of a document, fewer for the last; best a row's length. Limited to the model's longest sequence.
        batch_size: Documents sampled at once.
        prefix: Tokens before each document during sampling, such as BOS; not part of it.

    Returns:
        Documents without an end-of-text token.

    Raises:
        UsageError: If count or length is too small.
    """
    from ngc_jax.models.sample_text import sample_tokens

    if count < 2 or length < 2:
        raise UsageError(f"{count} tokens in documents of {length} to sample; expected at least 2 and 2")
    length = min(length, model.config.max_length - len(prefix), count)
    tokens = sample_tokens(model, count, key, length=length, batch_size=batch_size, prefix=prefix)
    return [TokenDocument(tokens[begin : begin + length]) for begin in range(0, count, length)]


def _read_whole(config: SourceConfig) -> None:
    """Check sources that are not tables: no streams, and no columns."""
    if config.streaming:
        raise UsageError(f"{config.label} is not streamed; set streaming to false")
    if config.prompt_column is not None:
        raise UsageError(f"{config.label} has no columns; leave out prompt_column")


def _files(config: SourceConfig) -> Sequence[Document] | Stream:
    names = [config.name] if isinstance(config.name, str) else list(config.name)
    files = [file for name in names for file in _matches(name)]
    kinds = {Path(file).suffix.lower() for file in files}
    if len(files) == 1 and not config.streaming and not kinds & (set(_BUILDERS) - {".txt"}):
        _read_whole(config)
        return [Document(read_text(files[0]))]
    if len({_BUILDERS.get(kind) for kind in kinds}) > 1 or not kinds <= set(_BUILDERS):
        raise UsageError(
            f"the files {config.label} end in {', '.join(sorted(kinds))}; expected files of one kind: "
            f"{', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[min(kinds)]
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    return _load(config, config.column, builder, data_files=files, split="train", **options)


def _matches(name: str) -> list[str]:
    name = os.path.expanduser(name)
    if not any(character in name for character in "*?["):
        if not Path(name).exists() or Path(name).is_dir():
            raise UsageError(f"there is no text file {name}; give a file, pydoc, hub:NAME or {_GYM}:TASK")
        return [name]
    files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    if not files:
        raise UsageError(f"no file is called {name}; check the pattern and the directory")
    return files


def _hub(config: SourceConfig, name: str) -> Sequence[Document] | Stream:
    _, path, *rest = name.split(":")
    subset, split, column = (rest + [""] * 3)[:3]
    if not path or len(rest) > 3:
        raise UsageError(f"the dataset is named {name!r}; expected hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    return _load(config, column or config.column, path, subset or None, split=split or "train")


def _load(config: SourceConfig, column: str, *args: Any, **options: Any) -> Sequence[Document] | Stream:
    """The result of `datasets.load_dataset` with these arguments, as documents."""
    import datasets

    def refuse(error: Exception) -> UsageError:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())[:160] or type(error).__name__
        return UsageError(f"{config.label} cannot be loaded ({reason}); check its name, its format and the network")

    # datasets raises StopIteration for an empty .jsonl.
    errors = (OSError, ValueError, ConnectionError, StopIteration, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(*args, streaming=config.streaming, **options)
        names = rows.column_names
        if names is None:  # a stream whose columns are known only once it is read
            names = list(next(iter(rows), {}))
    except errors as error:
        raise refuse(error) from error
    for wanted in (column, config.prompt_column):
        if wanted is not None and wanted not in names:
            raise UsageError(f"{config.label} has no column {wanted!r}; it has {', '.join(names) or 'none'}")

    def read(row: Mapping[str, Any]) -> Document:
        prompt = "" if config.prompt_column is None else _text(config, config.prompt_column, row)
        return Document(_text(config, column, row), prompt)

    rows = rows.select_columns([column, *([config.prompt_column] if config.prompt_column else [])])
    if config.streaming:

        def part(index: int, count: int) -> Any:
            return rows.shard(count, index, contiguous=False)  # even for one part: it has its own position

        return Stream(max(rows.num_shards, 1), part, read, config.label)
    documents: Sequence[Document] = TableRows(rows, read)
    if config.joined and len(documents):
        documents = [Document("\n".join(document.text for document in documents))]
    if not len(documents):
        raise UsageError(f"{config.label} has no rows; give a source with text")
    return documents


def _text(config: SourceConfig, column: str, row: Mapping[str, Any]) -> str:
    """A row's text; a missing one is empty."""
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(
            f"column {column!r} of {config.label} holds {type(value).__name__}, for example {str(value)[:40]!r}; "
            "expected text, choose another column"
        )
    return value


@dataclass(frozen=True)
class GymTask(Sequence[Document]):
    """Questions of a reasoning-gym task, each generated on request from the seed and its number."""

    questions: Any
    label: str

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):  # reasoning-gym would generate one, and iteration would never end
            raise IndexError(index)
        entry = self.questions[index % len(self)]
        if entry["answer"] is None:
            raise UsageError(f"{self.label} has questions without a single answer; choose another task")
        return Document(str(entry["answer"]), str(entry["question"]))


def _gym(config: SourceConfig, task: str) -> GymTask:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UsageError(f"{config.label} needs the package reasoning-gym: pip install 'ngc-jax[reasoning]'") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise UsageError(f"{_GYM} has no task {task!r}; it has {len(DATASETS)}, such as {', '.join(near)}")
    try:
        questions = reasoning_gym.create_dataset(task, seed=config.seed, size=config.size, **config.arguments)
    except (AssertionError, TypeError, ValueError) as error:  # how tasks refuse their arguments
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UsageError(f"{config.label} refuses its arguments ({reason}); check them") from error
    return GymTask(questions, config.label)
