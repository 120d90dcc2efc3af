"""Metrics of a run: one JSON object a line, and TensorBoard's event files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ngc_jax.files import write_text

_FLUSH_SECONDS = 30.0


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` of a directory; a context manager. Only process 0 writes.

    Nothing is opened or created before the first entry. A continued run appends, after `continue_after` has removed
    the entries of steps that a lost process had done and that are repeated.
    """

    def __init__(self, directory: str | Path) -> None:
        """Set the directory.

        Args:
            directory: Of the run; created if missing.
        """
        self._directory = Path(directory)
        self._file = self._directory / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._purge: int | None = None
        self._lines: TextIO | None = None
        self._board: _Board | None = None

    def continue_after(self, step: int) -> None:
        """Remove the lines of later steps, and evaluations of this one, which are repeated."""
        if not self._writes or not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _comes_before(line, step)]
        if kept != lines:
            write_text(self._file, "".join(f"{line}\n" for line in kept))
            self._purge = step + 1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The first error is more informative than another failure to write on a full disk.
        with suppress(OSError) if error is not None else _named(self._directory):
            try:
                if self._lines is not None:
                    self._lines.close()
            finally:
                if self._board is not None:
                    self._board.close()

    def write(self, metrics: Mapping[str, float]) -> None:
        """Write one entry; `step` is its step, all others are scalars.

        Raises:
            OSError: If it cannot be written, with the file's name.
        """
        if not self._writes:
            return
        with _named(self._file):
            if self._lines is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._lines = self._file.open("a", encoding="utf-8")
            self._lines.write(json.dumps(dict(metrics)) + "\n")
            self._lines.flush()
        with _named(self._directory / "tensorboard"):
            if self._board is None:
                self._board = _Board(self._directory / "tensorboard", self._purge)
            self._board.add(metrics)

    def entries(self) -> list[dict[str, float]]:
        """All entries of the run, including those of earlier processes; empty on processes other than 0."""
        if not self._writes or not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]


class _Board:
    """TensorBoard's events, written by the calling thread.

    tensorboardX's own writer has a thread that ends when it cannot write; then its queue fills, and the run waits
    forever.
    """

    def __init__(self, directory: Path, purge: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # A unique name, or a run that is restarted within a second would replace the file.
        self._writer: Any = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
        self._flushed = 0.0
        if purge is not None:
            self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def add(self, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if name != "step"]
        self._write(Event(step=int(metrics["step"]), summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Add the name of the written file to the operating system's errors, which lack it for an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise


def _comes_before(line: str, step: int) -> bool:
    """Whether a line belongs to a step up to this one; a truncated line belongs to none."""
    try:
        metrics = json.loads(line)
        return bool(metrics["step"] < step or (metrics["step"] == step and "loss" in metrics))
    except (ValueError, KeyError, TypeError):
        return False
