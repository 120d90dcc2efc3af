"""Parallel map over small linear algebra problems on the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# The largest matrix width for which BLAS runs on one thread.
_SMALL_MATRIX = 4096
# Items in flight: enough to balance the threads, few enough that their results do not fill the memory.
_AT_ONCE = 16


def thread_map(
    run: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    costs: Sequence[float],
    widths: Sequence[int],
) -> Iterator[Result]:
    """Apply `run` to every item, in order; on one thread for each core if all items are small.

    BLAS threads wait for each other by spinning. On small matrices two threads gain little, and on a busy machine they
    cost tens of times more than one. Each item therefore gets a single BLAS thread.

    Args:
        run: Pure, and mostly NumPy or SciPy, which release the GIL.
        items: The arguments of `run`.
        costs: Of each item, roughly proportional to its time: the longest start first.
        widths: Of each item's widest matrix.
    """
    if len(items) < 2 or not all(width < _SMALL_MATRIX for width in widths):
        yield from map(run, items)
        return
    from threadpoolctl import threadpool_limits  # an accelerator's machine may lack it, and its matrices are large

    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, len(items)))
            longest_first = sorted(some, key=lambda index: -costs[index])
            futures = {index: pool.submit(run, items[index]) for index in longest_first}
            for index in some:
                yield futures.pop(index).result()
