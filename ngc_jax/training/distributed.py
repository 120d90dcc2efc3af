"""Training with several processes."""

from __future__ import annotations

import jax

from ngc_jax.errors import UsageError


def start_processes(coordinator: str | None, count: int | None = None, index: int | None = None) -> None:
    """Join the other processes; before any other use of a device. Does nothing without a coordinator.

    Args:
        coordinator: Address host:port of process 0; or "auto" if the environment provides everything (Cloud TPU, SLURM,
            Kubernetes, Open MPI).
        count: Number of processes; needed with an address.
        index: Index of this process; needed with an address.

    Raises:
        UsageError: If the three are inconsistent.
    """
    if coordinator is None:
        if count is not None or index is not None:
            raise UsageError(
                "process_count and process_index need the coordinator's address; add --coordinator HOST:PORT"
            )
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    if count is None or index is None or not 0 <= index < count:
        raise UsageError(f"with --coordinator give --process-count and --process-index; got {count} and {index}")
    jax.distributed.initialize(coordinator, count, index)
