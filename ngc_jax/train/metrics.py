"""Metrics of a run: one JSON object a line, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX import SummaryWriter

from ngc_jax.files import write_text


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` of a directory; a context manager. Only process 0 writes.

    A run that continues appends, after `continue_after` has removed what was lost with a process and is done again.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open or make them.

        Args:
            directory: Of the run; made if missing.
        """
        self._lines = self._board = None
        if jax.process_index() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._directory = Path(directory)
            self._file = self._directory / "metrics.jsonl"
            self._lines = self._file.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._directory / "tensorboard"))

    def continue_after(self, step: int) -> None:
        """Remove the lines of later steps, and evaluations of this one, which are made again."""
        if self._lines is None or self._board is None:
            return
        self._lines.close()
        lines = self._file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _comes_before(line, step)]
        if kept != lines:
            write_text(self._file, "".join(f"{line}\n" for line in kept))
            self._board.close()
            self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=step + 1)
        self._lines = self._file.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None and self._board is not None:
            self._lines.close()
            self._board.close()

    def write(self, metrics: Mapping[str, float]) -> None:
        """One entry; `step` is its step, all others are scalars."""
        if self._lines is None or self._board is None:
            return
        self._lines.write(json.dumps(dict(metrics)) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))


def _comes_before(line: str, step: int) -> bool:
    """Whether a line is of a step up to this one; a line that was cut short is of none."""
    try:
        metrics = json.loads(line)
        return bool(metrics["step"] < step or (metrics["step"] == step and "loss" in metrics))
    except (ValueError, KeyError, TypeError):
        return False
