"""Documents of a task: from a JSON Lines file, or from a dataset of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.specs import Document
from ngc_jax.files import parse_json
from ngc_jax.lazy import missing_extra
from ngc_jax.text import load_hub_rows

HUB = "hub:"


def read_documents(source: str) -> list[Document]:
    """The documents of a file (JSON Lines, or one JSON list), or of a dataset of the hub.

    Args:
        source: A path, or `hub:NAME[:CONFIG[:SPLIT]]`; the split is `test` by default.

    Raises:
        UsageError: If it cannot be read, has no document, or something that is not an object.
    """
    return _hub_documents(source) if source.startswith(HUB) else _file_documents(source)


def document_key(document: Document) -> str:
    """A hash of a document's content, by which two runs are seen to have answered the same one."""
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _hub_documents(source: str) -> list[Document]:
    name, config, split, *more = (source.removeprefix(HUB) + "::").split(":")
    if not name or any(more):
        raise UsageError(f"{source} names no dataset; expected hub:NAME[:CONFIG[:SPLIT]]")
    try:
        rows = load_hub_rows(source, name, config, split or "test")
    except ModuleNotFoundError as error:
        advice = missing_extra(error)
        if advice is None:
            raise
        raise UsageError(f"the dataset {source} {advice}") from None
    if len(rows) == 0:
        raise UsageError(f"{source} has no documents; choose another split")
    return [dict(row) for row in rows]


def _file_documents(file: str) -> list[Document]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the data {file} cannot be read ({error}); give a JSON Lines file in UTF-8") from None
    found: list[Document] = []
    if text.lstrip().startswith("["):
        entries: Iterable[tuple[int, str | Any]] = enumerate(_json(text, file, 1), start=1)
    else:
        entries = (
            (number, _json(line, file, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        )
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise UsageError(f"entry {number} of {file} is {type(entry).__name__}; expected an object with fields")
        found.append(entry)
    if not found:
        raise UsageError(f"{file} has no documents; expected a JSON object on each line")
    return found


def _json(text: str, file: str, line: int) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"line {line} of {file} is not JSON ({error}); correct or remove it") from None
