"""Responses on disk, one JSON line each: what was answered is not asked again, however a run ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.requests import Request, Response
from ngc_jax.files import Closing, parse_json

FILE = "responses.jsonl"


class Responses(Closing):
    """The responses of one run, in a directory; a context manager.

    The first line of the file is the run's settings. Responses are appended batch by batch, and are on the disk before
    the next batch begins. A process that was killed may leave half a line, which is dropped.

    Attributes:
        found: By the request's id.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open a run's responses, or begin them.

        Raises:
            UsageError: If the directory holds responses of other settings.
        """
        self.found: dict[str, Response] = {}
        self._path = directory / FILE
        settings = json.loads(json.dumps(settings))
        lines: list[Any] = []
        if self._path.exists() and not overwrite:
            text = self._path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            try:
                lines = [parse_json(line) for line in whole.splitlines()]
                self.found = {str(line["id"]): line for line in lines[1:]}
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self._path} is not a file of responses ({error!r}); choose another --out") from None
            if lines and lines[0] != {"settings": settings}:
                raise UsageError(
                    f"{directory} holds responses of {_difference(lines[0].get('settings'), settings)}; choose another "
                    "directory, or overwrite it"
                )
            os.truncate(self._path, len(whole))
        elif self._path.exists():
            self._path.unlink()
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if not lines:
            self._write([{"settings": settings}])

    def add(self, requests: Iterable[Request], responses: Iterable[Response]) -> None:
        """Keep the responses of a batch; those that are there already remain as they are."""
        rows = [
            {"id": request.id, **request.about, **response}
            for request, response in zip(requests, responses, strict=True)
            if request.id not in self.found
        ]
        self._write(rows)
        self.found |= {row["id"]: row for row in rows}

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """The first setting that differs, in words."""
    if isinstance(before, dict):
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                return f"another {name} ({str(before.get(name))[:60]}, not {str(now.get(name))[:60]})"
    return "another run"
