"""How much of the host's memory this process has used, and giving back what it no longer needs."""

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

    On Linux from /proc: what `getrusage` says there begins with the size of the process that started this one.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Windows has none

    # In KiB on other systems, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_freed() -> None:
    """Let the system have the memory that this process has freed; where it is not known how, do nothing.

    glibc keeps a pool for every thread and hands no page of it back by itself. For XLA's threads that comes to half a
    gigabyte, which other threads cannot use.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def handed_over(mapping: MutableMapping[Key, Value]) -> dict[Key, Value]:
    """All entries, taken out of a mapping: a generator that yields them so does not hold them while they are used."""
    taken = dict(mapping)
    mapping.clear()
    return taken
