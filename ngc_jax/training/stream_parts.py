"""Streams as grain iterators: parts that are read repeatedly, and batches of rows from several parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.training.packing import Row
from ngc_jax.training.sources import Document, Stream

Position = dict[str, Any]


class PartSteps(grain.IterDataset):
    """A process's batch of each step, which takes `each` rows of every part."""

    def __init__(self, parts: Mapping[int, grain.IterDataset], each: int, mine: range, prefetch: int) -> None:
        super().__init__(list(parts.values()))
        self._numbers, self._each, self._mine, self._prefetch = list(parts), each, mine, prefetch

    def __iter__(self) -> grain.DatasetIterator:
        parents = [part.__iter__() for part in self.parents]
        return Ahead(_PartStepsIterator(parents, self._numbers, self._each, self._mine), self._prefetch)


class Ahead(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching iterator, but closed only once: closing it twice fails when Python exits."""

    def close(self) -> None:
        """Ends the thread."""
        if not self._closed:
            super().close()


class _PartStepsIterator(grain.DatasetIterator):
    def __init__(self, parents: list[grain.DatasetIterator], numbers: list[int], each: int, mine: range) -> None:
        super().__init__(parents)
        self._numbers, self._each, self._mine = numbers, each, mine

    def __next__(self) -> Row:
        rows = []
        for number, parent in zip(self._numbers, self._parents, strict=True):
            for row in range(number * self._each, (number + 1) * self._each):
                made = next(parent)  # also if it belongs to another process
                if row in self._mine:
                    rows.append(made)
        return stack(rows)

    def get_state(self) -> Position:
        return {str(number): p.get_state() for number, p in zip(self._numbers, self._parents, strict=True)}

    def set_state(self, state: Position) -> None:
        for number, parent in zip(self._numbers, self._parents, strict=True):
            if str(number) not in state:
                raise UsageError(
                    f"the position lacks part {number} of the data; it was not gathered from all processes"
                )
            parent.set_state(state[str(number)])


class StreamPart(grain.IterDataset):
    """The documents of one part of a stream, repeatedly."""

    def __init__(self, stream: Stream, part: int, parts: int) -> None:
        super().__init__()
        self._stream, self._which = stream, (part, parts)

    def __iter__(self) -> _StreamPartIterator:
        return _StreamPartIterator(self._stream, self._stream.open_part(*self._which))


class _StreamPartIterator(grain.DatasetIterator):
    def __init__(self, stream: Stream, rows: Any) -> None:
        super().__init__()
        self._stream, self._table, self._rows = stream, rows, iter(rows)
        self._start: Position = rows.state_dict()
        self._read_any = False

    def __next__(self) -> Document:
        row = next(self._rows, None)
        if row is None:
            if not self._read_any:
                raise UsageError(f"{self._stream.label} has a part without rows; give fewer or fuller files")
            self._go(self._start)
            row = next(self._rows)
        self._read_any = True
        return self._stream.read(row)

    def _go(self, position: Position) -> None:
        self._rows.close()
        self._table.load_state_dict(position)
        self._rows = iter(self._table)

    def get_state(self) -> Position:
        return {"rows": self._table.state_dict(), "read_any": self._read_any}

    def set_state(self, state: Position) -> None:
        self._read_any = state["read_any"]
        self._go(state["rows"])

    def close(self) -> None:
        closed = self._closed
        super().close()  # first, because closing the rows may close this again
        if not closed:
            self._rows.close()


class Each(grain.experimental.FlatMapTransform):
    """Emits every row of a window separately."""

    def flat_map(self, element: list[Row]) -> list[Row]:
        """The rows."""
        return element


def stack(rows: Sequence[Row]) -> Row:
    """A batch of rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
