"""Batches of one token stream: rows of equal length, in an order that the seed and the epoch give."""

from __future__ import annotations

from typing import Any

import numpy as np

from ngc_jax.errors import UsageError


class StreamBatches:
    """Rows of a token stream, shuffled anew in every epoch, without end.

    The position is the number of batches taken, whatever the number of processes: a run can go on with another one.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Cut the stream; what is left at its end is dropped.

        Args:
            tokens: (T,) token ids.
            length: L, tokens of a row.
            batch_size: B, rows of a batch over all processes.
            seed: Of the order.
            process: Which this is.
            processes: How many there are.

        Raises:
            UsageError: If the stream has fewer rows than a batch, or the processes do not divide a batch.
        """
        if length < 2 or batch_size < 1:
            raise UsageError(f"rows of {length} tokens, {batch_size} to a batch; expected at least 2 and at least 1")
        rows = len(tokens) // length
        if rows < batch_size:
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, {rows} rows of {length}, and a batch needs "
                f"{batch_size}; give a longer text, shorter rows or a smaller batch"
            )
        if batch_size % processes:
            raise UsageError(f"a batch of {batch_size} rows cannot be shared by {processes} processes")
        self._rows = np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)
        self._batch_size, self._seed = batch_size, seed
        share = batch_size // processes
        self._mine = slice(process * share, (process + 1) * share)
        self._taken = 0

    @property
    def batches_per_epoch(self) -> int:
        """Every row is in at most one of them."""
        return len(self._rows) // self._batch_size

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's rows of the next batch: tokens, positions, starts and weights, each (B / processes, L)."""
        epoch, index = divmod(self._taken, self.batches_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        chosen = order[index * self._batch_size : (index + 1) * self._batch_size][self._mine]
        self._taken += 1
        tokens = self._rows[chosen]
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return {
            "tokens": tokens,
            "positions": np.array(positions),
            "starts": np.zeros_like(tokens),
            "weights": (positions > 0).astype(np.float32),
        }

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"batches": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._taken = int(state["batches"])
