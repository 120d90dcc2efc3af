"""Mathematical answers, compared by the library math-verify in a process of their own.

The library's time limits work by signals, in the main thread only, and cannot interrupt one long operation. Another
process can be killed at any moment, from any thread.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing
from ngc_jax.lazy import install_advice

_LOG = logging.getLogger(__name__)
# Longest time to import the library, on a busy machine.
_START = 120.0


class MathJudge(Closing):
    r"""Whether mathematical answers equal their targets; a context manager.

    An answer is the last boxed expression of a text, or else its last expression: LaTeX between dollar signs, or a
    number. Expressions are equal if math-verify (https://github.com/huggingface/Math-Verify) finds them so: `1/2` and
    `\frac{1}{2}` are, and sets in another order. One that it cannot read equals itself as a text.

    Args:
        seconds: Longest time for one comparison. What takes longer is wrong, and is counted in the log at the end.

    Raises:
        UsageError: If the library is not installed.

    Example:
        >>> with MathJudge() as judge:  # doctest: +SKIP
        ...     judge(r"Half of it, so $\boxed{\frac{1}{2}}$.", "0.5")
        True
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._known: dict[tuple[str, str], bool] = {}
        self._lock = threading.Lock()
        self._undecided = 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._start()

    def __call__(self, answer: str, target: str) -> bool:
        """Whether an answer equals a target.

        Args:
            answer: A text.
            target: An expression in LaTeX, or a text with a boxed one.
        """
        with self._lock:
            pair = (answer, target)
            if pair not in self._known:
                self._known[pair] = self._ask(answer, target)
            return self._known[pair]

    def close(self) -> None:
        """End the process."""
        self._stop()
        if self._undecided:
            _LOG.warning(
                "%d answers could not be compared within %g seconds, and count as wrong", self._undecided, self._seconds
            )

    def _ask(self, answer: str, target: str) -> bool:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            self._start()
        assert self._worker is not None
        assert self._worker.stdin is not None
        line = json.dumps({"answer": answer, "target": target, "seconds": self._seconds}) + "\n"
        try:
            self._worker.stdin.write(line.encode())
            self._worker.stdin.flush()
            reply = self._read(self._seconds)
        except OSError:  # it has ended
            reply = None
        if reply is None:
            self._undecided += 1
            self._stop()
            return False
        return bool(reply["right"])

    def _start(self) -> None:
        # The package is found where this process found it.
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "ngc_jax.evaluation.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        reply = self._read(_START)
        if reply is None or "missing" in reply:
            self._stop()
        if reply is None:
            raise UsageError("the process that compares mathematical answers does not start; try again")
        if "missing" in reply:
            raise UsageError(f"answers of the form math need {install_advice(reply['missing'] or 'math_verify')}")

    def _read(self, seconds: float) -> Mapping[str, Any] | None:
        """The next line of the process; None if there is none in time."""
        assert self._worker is not None
        assert self._worker.stdout is not None
        end, line = time.monotonic() + seconds, b""
        descriptor = self._worker.stdout.fileno()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            piece = os.read(descriptor, 4096)
            if not piece:
                return None
            line += piece
        found: Mapping[str, Any] = json.loads(line)
        return found

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()  # closes the pipes
            self._worker = None
