import subprocess
import sys

import numpy as np

from ngc_jax.host_memory import peak_bytes


def test_the_peak_is_this_process_s_own():
    """Not that of the process which started it, as getrusage has it on Linux."""
    before = peak_bytes()
    large = np.ones(max(before, 400_000_000) // 8 + 25_000_000)
    assert peak_bytes() > large.nbytes
    program = "from ngc_jax.host_memory import peak_bytes; print(peak_bytes())"
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout)
    assert 2**20 < child < large.nbytes
