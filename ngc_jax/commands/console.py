"""Progress bars and tables, on stderr and stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class _Console(Console):
    """Prints texts as they are: a prompt may hold [/INST] or :smile:, which rich would take for its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """The reader has gone: that is no error, and the command line ends quietly."""
        raise BrokenPipeError


console = _Console(soft_wrap=True)
_stderr = _Console(stderr=True)

Report = Callable[..., None]


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step when slow."""

    def render(self, task: Task) -> Text:
        """Draw the rate of a task."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


@contextmanager
def progress_bar(stage: str = "") -> Iterator[Report]:
    """Bars with rate and time left; yields report(done, total, stage), one bar for every stage.

    Drawn on stderr when that is a terminal; otherwise each stage is one line when it ends.
    """
    progress = Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=_stderr,
        disable=not _stderr.is_terminal,
    )
    tasks = {}
    default_stage = stage

    def report(done: int, total: int, stage: str = default_stage) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)
        if done == total and not _stderr.is_terminal:
            _stderr.print(f"{stage}: {done} of {total} done")

    with progress:
        yield report


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result
