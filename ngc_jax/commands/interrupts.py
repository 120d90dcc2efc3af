"""SIGTERM and Ctrl-C as exceptions that unwind the stack, so that partial output is removed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Terminated` for SIGTERM and KeyboardInterrupt for Ctrl-C, where that is safe. In the main thread only.

    A signal handler's exception occurs between any two steps of the program. During an import it can end the process,
    because C++ code that is being initialised calls Python and expects no error; in a callback of the garbage
    collector it is reported and lost. In both cases it is raised a moment later.

    While the stack unwinds, another SIGTERM is ignored, and another Ctrl-C ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _Interrupts().installed():
        yield


class _Interrupts:
    def __init__(self) -> None:
        self._received: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        # The parent process may want the program to ignore a signal, as a shell does for Ctrl-C of background jobs.
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, self._handle) for number in (*numbers, signal.SIGALRM)}
        self._report, sys.unraisablehook = sys.unraisablehook, self._raise_what_was_lost
        try:
            yield
        except Exception as error:
            if self._received is not None:  # C++ turns exceptions in its callbacks into its own errors
                raise self._exception() from error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._report
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            if self._received is not None:
                if number == signal.SIGINT:
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                return
            self._received = number
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            raise self._exception()

    def _raise_what_was_lost(self, lost: sys.UnraisableHookArgs) -> None:
        if self._received is not None and issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            self._report(lost)

    def _exception(self) -> KeyboardInterrupt:
        return Terminated() if self._received == signal.SIGTERM else KeyboardInterrupt()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
