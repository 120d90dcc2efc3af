"""Measure this process's use of host memory, and release freed memory to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import TypeVar

_STATUS = Path("/proc/self/status")
Key = TypeVar("Key")
Value = TypeVar("Value")


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    On Linux from /proc: `getrusage` starts there with the size of the parent process.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Windows has none

    # In KiB on other systems, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_freed() -> None:
    """Release memory that this process has freed to the system; does nothing where that is not supported.

    glibc keeps a pool for every thread and never releases its pages. For XLA's threads the pools grow to half a
    gigabyte, which other threads cannot use.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def handed_over(mapping: MutableMapping[Key, Value]) -> dict[Key, Value]:
    """Move all entries out of a mapping, so that a generator that yields them does not hold them in memory."""
    taken = dict(mapping)
    mapping.clear()
    return taken
