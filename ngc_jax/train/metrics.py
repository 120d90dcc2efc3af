"""Metrics of a run: one JSON object a line, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` of a directory; a context manager. Only process 0 writes.

    A run that goes on appends. Steps that were lost with a process and done again have two lines: the later holds.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open or make them.

        Args:
            directory: Of the run; made if missing.
        """
        self._lines = self._board = None
        if jax.process_index() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._lines = (Path(directory) / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(Path(directory) / "tensorboard"))

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
