"""Where the command line meets the world: pipes, devices, links, signals, full disks, texts that look like markup."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ngc_jax import cli
from ngc_jax.commands.console import console, progress_bar, table
from ngc_jax.commands.info import InfoConfig
from ngc_jax.errors import UsageError
from ngc_jax.files import check_output, check_target, write_summary
from ngc_jax.models.save import save_model
from ngc_jax.text import read_text
from tests.tiny import tiny_model

MARKUP = ["[/INST]", "[bold]x[/bold]", ":smile:", "[link=http://x]y[/link]", "[red]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(tiny_model(), tmp_path_factory.mktemp("edge") / "dense"))


# --- what is printed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MARKUP)
def test_texts_are_printed_as_they_are(text, capsys):
    console.print(text)
    console.print(table(f"title {text}", ["a", text], [[text, "1"]]))
    with progress_bar(text) as bar:
        bar(1, 1)
    captured = capsys.readouterr()
    assert captured.out.count(text) == 4
    assert captured.err == f"{text}: 1 of 1 done\n"


def test_prompts_that_look_like_markup(dense, capsys):
    options = ["--max-new-tokens", "2", "--prompt", "a [/INST]", "[bold]b :smile:"]
    assert cli.main(["generate", dense, *options]) == 0
    out = capsys.readouterr().out
    assert "a [/INST]\n" in out
    assert "[bold]b :smile:\n" in out


def test_a_path_that_is_no_text_is_printed(tmp_path, capfd):
    assert cli.main(["info", os.fsdecode(os.fsencode(tmp_path) + b"/\xff")]) == 2
    assert "no such model" in capfd.readouterr().err


# --- --json -----------------------------------------------------------------------------------------------------


def test_dash_is_standard_output_and_nothing_else_goes_there(dense, capsys):
    assert cli.main(["info", dense, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["command"] == "info"
    assert "dense: no groups" in captured.err


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_summary(str(link), {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o600
    dangling = tmp_path / "dangling.json"
    dangling.symlink_to(tmp_path / "new.json")
    write_summary(str(dangling), {"a": 2})
    assert dangling.is_symlink()
    assert json.loads((tmp_path / "new.json").read_text()) == {"a": 2}


def test_pipes_and_devices_are_written_to(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_text()))
    reader.start()
    check_target(str(fifo))
    write_summary(str(fifo), {"a": 1})
    reader.join()
    assert json.loads(found[0]) == {"a": 1}
    assert fifo.is_fifo()
    write_summary("/dev/null", {"a": 1})
    assert Path("/dev/null").is_char_device()


def test_standard_output_that_is_a_file_keeps_what_was_printed(dense, tmp_path):
    with (tmp_path / "out.txt").open("w") as out:
        command = [sys.executable, "-m", "ngc_jax", "info", dense, "--json", "/dev/stdout"]
        subprocess.run(command, stdout=out, check=True)
    text = (tmp_path / "out.txt").read_text()
    assert "dense: no groups\n{" in text
    assert json.loads(text[text.index("\n{") :])["command"] == "info"


@pytest.mark.parametrize("target", ["{tmp}", "{tmp}/none/x.json", "{tmp}/file/x.json", ""])
def test_a_place_that_cannot_be_written_is_found_before_the_work(target, dense, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(InfoConfig, "run", lambda self: pytest.fail("the work was begun"))
    assert cli.main(["info", dense, f"--json={target.format(tmp=tmp_path)}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- texts ------------------------------------------------------------------------------------------------------


def test_a_text_may_be_a_pipe_and_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(str(tmp_path / "bom.txt")) == "abc"
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}") == "from a pipe"
    os.close(reading)


def test_home_is_expanded_in_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("abc")
    assert read_text("~/book.txt") == "abc"
    assert check_output("~/out", overwrite=False) == tmp_path / "out"


@pytest.mark.parametrize("name", ["{tmp}", "{tmp}/none", "a\0b", "x" * 5000])
def test_what_is_no_text_is_refused(name, tmp_path):
    with pytest.raises(UsageError):
        read_text(name.format(tmp=tmp_path))


# --- signals and the operating system ---------------------------------------------------------------------------


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


def test_a_reader_that_leaves_early_is_no_error(dense):
    script = f"set -o pipefail; {sys.executable} -m ngc_jax info {dense} --all-groups | head -0"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_can_complete_commands_and_options(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print_completion", "shtab-bash"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert "convert" in captured.out
    assert captured.err == ""
    assert subprocess.run(["bash", "-n"], input=captured.out, text=True, check=False).returncode == 0
