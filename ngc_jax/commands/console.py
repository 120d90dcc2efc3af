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

from ngc_jax.commands.escapes import escape_controls


class _Console(Console):
    """Prints strings literally: a prompt may contain [/INST] or :smile:, which rich would interpret.

    A file or a pipe gets every character; on a terminal, which obeys control characters, they are shown as
    escapes (`escape_controls`).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, sep: str = " ", end: str = "\n", style: Any = None, **options: Any) -> None:
        """Print strings literally, anything else as rich renders it."""
        if not all(isinstance(one, str) for one in objects):
            super().print(*objects, sep=sep, end=end, style=style, **options)
            return
        text = sep.join(objects)
        if not self.is_terminal:
            self.file.write(text + end)
        elif style is None:
            self.file.write(escape_controls(text) + end)
        else:
            super().print(Text(escape_controls(text), style=style), end=end, **options)
        self.file.flush()

    def on_broken_pipe(self) -> None:
        """The reader has closed the pipe: that is not an error, and the command line ends quietly."""
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
    """Bars with rate and remaining time; yields report(done, total, stage), one bar for every stage.

    Drawn on stderr if that is a terminal; otherwise each stage is one line when it ends.
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
            tasks[stage] = progress.add_task(escape_controls(stage), total=total)
        progress.update(tasks[stage], completed=done, total=total)
        if done == total and not _stderr.is_terminal:
            _stderr.print(f"{stage}: {done} of {total} done")

    with progress:
        yield report


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are numbers; control characters are shown as escapes."""
    result = Table(title=escape_controls(title), title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(escape_controls(column), justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*map(escape_controls, row))
    return result
