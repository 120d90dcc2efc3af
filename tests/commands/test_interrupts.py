"""Signals, and errors of the operating system: what ends a command, and how."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from ngc_jax import cli
from ngc_jax.commands.info import InfoConfig
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(tiny_model(), tmp_path_factory.mktemp("edge") / "dense"))


def run_that(monkeypatch, action):
    monkeypatch.setattr(InfoConfig, "run", lambda self: action())


def test_sigterm_unwinds_like_an_interrupt(monkeypatch, capsys):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    run_that(monkeypatch, work)
    assert cli.main(["info"]) == 143
    assert cleaned
    assert "terminated" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def wait():
    time.sleep(30)
    pytest.fail("the signal was lost")


def test_a_signal_in_the_middle_of_an_import_waits_for_its_end(tmp_path, monkeypatch):
    """An exception there would end the process where C++ is being initialised."""
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nsum(range(1000))\nwhole = True\n"
    (tmp_path / "imported_when_terminated.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        import imported_when_terminated

        found.append(imported_when_terminated.whole)
        wait()

    found: list[bool] = []
    run_that(monkeypatch, work)
    assert cli.main(["info"]) == 143
    assert sys.modules.pop("imported_when_terminated").whole


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch):
    def once(phase, info):
        if once in gc.callbacks:
            gc.callbacks.remove(once)
            os.kill(os.getpid(), signal.SIGINT)

    def work():
        gc.callbacks.append(once)
        gc.collect()
        wait()

    run_that(monkeypatch, work)
    assert cli.main(["info"]) == 130


def test_another_sigterm_does_not_disturb_the_cleaning_up(monkeypatch):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            wait()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    run_that(monkeypatch, work)
    assert cli.main(["info"]) == 143
    assert cleaned


def test_another_interrupt_ends_the_process_at_once():
    program = """
import os, signal, time
from ngc_jax.commands.interrupts import interruptible
with interruptible():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=20).returncode == -signal.SIGINT


def test_an_interrupt_in_code_made_from_text_has_the_usual_exit_code():
    program = """
import sys
from ngc_jax import cli, __main__
from ngc_jax.commands.info import InfoConfig
InfoConfig.run = lambda self: exec("import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)")
sys.argv = ["ngc-jax", "info"]
sys.exit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "ngc-jax: interrupted; no partial output was left\n")


def test_a_signal_that_is_ignored_is_left_alone(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_that(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(["info"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EDQUOT])
def test_errors_of_the_operating_system_are_one_line(number, monkeypatch, capsys):
    def fail():
        raise OSError(number, os.strerror(number), "some/file")

    run_that(monkeypatch, fail)
    assert cli.main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ngc-jax: error: some/file: {os.strerror(number)}; ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")])
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def fail():
        raise error

    run_that(monkeypatch, fail)
    assert cli.main(["info"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail():
        raise KeyError("defect")

    run_that(monkeypatch, fail)
    with pytest.raises(KeyError, match="defect"):
        cli.main(["info"])


def test_a_defect_after_an_error_of_the_operating_system_keeps_its_traceback(monkeypatch):
    def fail():
        try:
            raise FileNotFoundError(errno.ENOENT, "no such file", "x")
        except FileNotFoundError:
            return {}["defect"]

    run_that(monkeypatch, fail)
    with pytest.raises(KeyError, match="defect"):
        cli.main(["info"])


def test_a_reader_that_leaves_early_is_no_error(dense):
    script = f"set -o pipefail; {sys.executable} -m ngc_jax info {dense} --all-groups | head -0"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
