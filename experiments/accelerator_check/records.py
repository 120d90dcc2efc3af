"""Rows that are written as soon as they are known, figures that fail one by one, and limits of time."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

Values = Mapping[str, Any]
# Yields a row's name and its values; asks before it measures a row whether the row is wanted.
Figure = Callable[[Callable[[str], bool]], Iterator[tuple[str, Values]]]


class OutOfTimeError(Exception):
    """A figure has reached its limit."""


class Records:
    """The rows of a run, in `results.jsonl`; those of an earlier run with the same directory are kept.

    Attributes:
        rows: All rows so far.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "results.jsonl"
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed run may have written half a line
        earlier = [json.loads(line) for line in whole.splitlines()]
        self.rows: list[dict[str, Any]] = [row for row in earlier if "values" in row or row.get("finished")]
        self._file = self._path.open("w", encoding="utf-8")
        for row in self.rows:
            self._write(row)

    def wanted(self, figure: str, name: str | None = None) -> bool:
        """Whether a row, or a whole figure, is not there yet."""
        if name is None:
            return not any(row["figure"] == figure and row.get("finished") for row in self.rows)
        return not any(row["figure"] == figure and row.get("name") == name for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row: in the file, and on stdout."""
        self.rows.append(dict(row))
        self._write(row)
        print(json.dumps(row), flush=True)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def print_table(self) -> None:
        """Print all rows, one a line."""
        lines = []
        for row in self.rows:
            shown = ", ".join(f"{name} {_short(value)}" for name, value in row.get("values", {}).items())
            problem = row.get("error") or row.get("skipped")
            if shown or problem:
                lines.append((str(row["figure"]), str(row.get("name", "")), shown or str(problem)))
        widths = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
        for figure, name, text in lines:
            print(f"{figure:<{widths[0]}}  {name:<{widths[1]}}  {text}")
        sys.stdout.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_figures(records: Records, figures: Mapping[str, Figure], *, limit_s: float, total_s: float) -> int:
    """Run figures in order; one that fails or takes too long does not affect the others.

    Args:
        records: Where rows go.
        figures: By name.
        limit_s: Seconds of each figure. It ends at the next Python statement: compilation is not interrupted.
        total_s: Seconds of all. Then the process ends with code 3, whatever it is doing.

    Returns:
        The number of figures that failed or are incomplete.
    """
    began, incomplete = time.monotonic(), 0
    with _ended_after(records, total_s):
        for name, figure in figures.items():
            if not records.wanted(name):
                continue
            left = total_s - (time.monotonic() - began)
            started = time.monotonic()
            try:
                with _interrupted_after(min(limit_s, left)):
                    for row, values in figure(lambda row, name=name: records.wanted(name, row)):  # type: ignore[misc]
                        seconds = round(time.monotonic() - started, 2)
                        records.add({"figure": name, "name": row, "values": dict(values), "after_s": seconds})
                records.add({"figure": name, "finished": True, "after_s": round(time.monotonic() - started, 2)})
            except OutOfTimeError:
                incomplete += 1
                records.add({"figure": name, "skipped": f"the rest: out of time after {min(limit_s, left):.0f} s"})
            except Exception as error:  # the next figure may work
                incomplete += 1
                traceback.print_exc()
                records.add({"figure": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
    return incomplete


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block after some seconds, where the platform can (Unix, main thread)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _ended_after(records: Records, seconds: float) -> Iterator[None]:
    """End the process after some seconds even if it is inside a compilation."""

    def end() -> None:
        records.add({"figure": "run", "skipped": f"the rest: out of time after {seconds:.0f} s"})
        records.print_table()
        os._exit(3)

    # A little later than the last figure's own limit, which ends it in order.
    timer = threading.Timer(seconds + 2, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
