import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ngc_jax.host_memory import give_back_freed


def resident_bytes():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


# In a process of its own: that of a long test run is large already, and would have to grow by gigabytes.
PARENT_AND_CHILD = """
import subprocess, sys
import numpy as np
from ngc_jax.host_memory import peak_bytes

before = peak_bytes()
large = np.ones(max(before, 100_000_000) // 8 + 25_000_000)
after = peak_bytes()
program = "from ngc_jax.host_memory import peak_bytes; print(peak_bytes())"
child = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
print(large.nbytes, after, child)
"""


def test_the_peak_is_this_process_s_own():
    """Not that of the process which started it, as getrusage has it on Linux."""
    found = subprocess.run([sys.executable, "-c", PARENT_AND_CHILD], capture_output=True, check=True, text=True)
    large, after, child = map(int, found.stdout.split())
    assert after > large
    assert 2**20 < child < large


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give back what is freed by themselves")
def test_freed_memory_is_given_back():
    pieces = [bytearray(60_000) for _ in range(5_000)]  # each too small for a mapping of its own
    pin = bytearray(60_000)  # what is below it in the pool cannot be given back by making the pool shorter
    del pieces
    before = resident_bytes()
    give_back_freed()
    assert resident_bytes() < before - 200_000_000
    assert pin
