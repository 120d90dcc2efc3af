"""Texts in rows, as JSON Lines or datasets of the hub have them: plain rows, and conversations by the chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import parse_json
from ngc_jax.text import load_hub_rows, read_text

if TYPE_CHECKING:
    from ngc_jax.models.tokenizer import Tokenizer

# The fields that rows are read by; the first that the first row has.
Rows = Literal["messages", "prompt and response", "text"]
# Rows, each with its place for messages.
_Places = Iterator[tuple[str, Mapping[str, Any]]]
# Rows that are tokenised together.
_BATCH = 256
_EXPECTED = "expected an object with messages, or prompt and response, or text"


def fields_of(name: str) -> Rows | None:
    """The fields that the rows of a text are read by; None for a text without rows.

    Raises:
        UsageError: If it cannot be read, or its first row has none of them.

    Example:
        >>> fields_of("pydoc:first-half") is None
        True
    """
    rows = _rows(name)
    return None if rows is None else _kind(name, rows)[0]


def read_tokens(name: str, tokenizer: Tokenizer, most: int) -> tuple[np.ndarray, Rows | None]:
    """The first tokens of a text, and the fields that its rows were read by.

    Args:
        name: As for `ngc_jax.text.read_text`; a .jsonl file and a dataset without a column have rows.
        tokenizer: The model's.
        most: Number of tokens that suffice; more rows are not read.

    Returns:
        (T,) int32 ids, and the fields; None for a text without rows.

    Raises:
        UsageError: If it cannot be read, rows have other fields than the first, or conversations have no template.
    """
    rows = _rows(name)
    if rows is None:
        return tokenizer.encode(read_text(name)), None
    kind, rows = _kind(name, rows)
    parts, size = [], 0
    texts = (_text_of(kind, row, place, tokenizer) for place, row in rows)
    while size < most and (batch := list(itertools.islice(texts, _BATCH))):
        parts.append(tokenizer.encode("".join(batch)))
        size += len(parts[-1])
    return np.concatenate(parts), kind


def _kind(name: str, rows: _Places) -> tuple[Rows, _Places]:
    """The fields that rows are read by, from the first of them; and all rows."""
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{name} has no rows; {_EXPECTED} on each line")
    place, row = first
    for kind in get_args(Rows):
        if all(field in row for field in kind.split(" and ")):
            return kind, itertools.chain([first], rows)
    raise UsageError(f"{place} has {', '.join(map(str, row)) or 'nothing'}; {_EXPECTED}")


def _rows(name: str) -> _Places | None:
    """The rows of a text, with their places for messages; None if it has none."""
    if name.startswith("hub:"):
        _, dataset, *rest = name.split(":")
        config, split, column = (rest + [""] * 3)[:3]
        if column:
            return None
        found = load_hub_rows(name, dataset, config, split or "train")
        return ((f"row {number} of {name}", row) for number, row in enumerate(found))
    return _lines(name) if Path(name).suffix.lower() == ".jsonl" else None


def _lines(name: str) -> _Places:
    try:
        with Path(name).expanduser().open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield (place := f"line {number} of {name}"), _object(line, place)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise UsageError(f"the text {name} cannot be read: {error.strerror}; check its name and permissions") from error


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{place} is not JSON ({error}); correct or remove it") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place} is {type(row).__name__}; {_EXPECTED}")
    return row


def _text_of(kind: Rows, row: Mapping[str, Any], place: str, tokenizer: Tokenizer) -> str:
    """A row as text."""
    missing = [field for field in kind.split(" and ") if field not in row]
    if missing:
        raise UsageError(f"{place} has no {missing[0]}, and the first row has; give all rows the same fields")
    if kind == "messages":
        messages = row["messages"]
    else:
        for field in kind.split(" and "):
            if not isinstance(row[field], str):
                raise UsageError(f"{field} in {place} is {type(row[field]).__name__}; expected a text")
        if kind == "text":
            return str(row["text"]) + "\n"
        turns = (("user", row["prompt"]), ("assistant", row["response"]))
        messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=False)
    except UsageError as error:
        raise UsageError(f"{place} cannot be read as a conversation: {error}") from None
