"""Several processes that train together."""

from __future__ import annotations

import jax

from ngc_jax.errors import UsageError


def start_processes(coordinator: str | None, count: int | None = None, index: int | None = None) -> None:
    """Join the other processes; before anything else asks for a device. Does nothing without a coordinator.

    Args:
        coordinator: Address host:port of process 0; or "auto" where the environment tells all (Cloud TPU, SLURM,
            Kubernetes, Open MPI).
        count: Processes in all; needed with an address.
        index: Which this is; needed with an address.

    Raises:
        UsageError: If the three do not fit.
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
