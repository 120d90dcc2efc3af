"""Where the command line meets the world: pipes, devices, links, signals, full disks, texts that look like markup."""

import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
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
from ngc_jax.reporting.page import write_page
from ngc_jax.reporting.render.figures import new_figure, save_figure
from ngc_jax.text import read_text
from ngc_jax.training.data_config import SourceConfig
from ngc_jax.training.sources import open_source
from tests.models.compact import dense_model

MARKUP = ["[/INST]", "[bold]x[/bold]", ":smile:", "[link=http://x]y[/link]", "[red]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(dense_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("edge") / "dense"))


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


@pytest.mark.parametrize("text", ["a\tb  ", "\x1b[31mred", "bell\x07 back\x08 return\r", "x " * 99])
def test_a_pipe_gets_every_character_and_a_terminal_no_control_characters(text, monkeypatch, capsys):
    console.print(text, text, end="|")
    assert capsys.readouterr().out == f"{text} {text}|"
    monkeypatch.setattr(type(console), "is_terminal", True)
    console.print(text)
    console.print(text, style="bold")
    console.print(table(text, [text], [[text]]))
    shown = capsys.readouterr().out
    assert not set(shown.replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")) & set("\x1b\x07\x08\r")
    assert ("\\x1b[31mred" in shown) == ("red" in text)


def test_a_streamed_text_is_printed_through_the_console(dense, monkeypatch, capsys):
    monkeypatch.setattr("ngc_jax.models.generate.stream_text", lambda *_, **__: iter(["[/INST]", "\x1b[2J\n", "\t."]))
    assert cli.main(["generate", dense, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "[/INST]\x1b[2J\n\t.\n"
    monkeypatch.setattr(type(console), "is_terminal", True)
    assert cli.main(["generate", dense, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "[/INST]\\x1b[2J\n\t.\n"


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


def test_what_is_printed_before_and_after_is_kept(dense, tmp_path):
    """/dev/stdout is written where this process is in it, not at its begin or end."""
    link = tmp_path / "link"
    link.symlink_to("/dev/stdout")
    commands = [f"{sys.executable} -m ngc_jax info {dense} --json {target}" for target in ("/dev/stdout", link)]
    subprocess.run(["bash", "-c", f"({'; '.join(commands)}; echo after) > {tmp_path}/out.txt"], check=True)
    text = (tmp_path / "out.txt").read_text()
    assert text.count("dense: no groups\n{") == 2
    assert text.endswith("\n}\nafter\n")


def test_a_socket_is_written_to(dense):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_summary(f"/dev/fd/{theirs.fileno()}", {"a": 1})
        assert json.loads(ours.recv(100)) == {"a": 1}


def test_files_below_dev_are_files(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for number in (1, 2):
            check_target(f"{directory}/x.json")
            write_summary(f"{directory}/x.json", {"a": number})
        assert json.loads(Path(directory, "x.json").read_text()) == {"a": 2}


def test_links_that_lead_nowhere_and_closed_files_are_refused(dense, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for target in (str(tmp_path / "loop"), "/dev/fd/9999"):
        assert cli.main(["info", dense, "--json", target]) == 2
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""
    assert (tmp_path / "loop").is_symlink()


def test_standard_output_may_be_closed(dense):
    script = f"{sys.executable} -m ngc_jax info {dense} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_output_keeps_links_and_devices(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    target.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to("target")
    for write in (lambda: write_page("new", link), lambda: save_figure(new_figure(1, 1), link)):
        write()
        assert link.is_symlink()
        assert target.read_bytes()[:4] in (b"new", b"\x89PNG")
        assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]
    write_page("new", Path("/dev/null"))
    with pytest.raises(OSError, match="not a file"):
        save_figure(new_figure(1, 1), Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_a_model_is_not_exported_to_a_device(dense, capsys):
    assert cli.main(["export", dense, "--to", "gguf", "--out", "/dev/null", "--overwrite"]) == 2
    assert "device" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


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


def test_a_dash_is_standard_input(tmp_path):
    program = (
        "import sys; from ngc_jax import cli, text; print(text.read_text(cli.parse_arguments(sys.argv[1:])[1].text))"
    )
    command = [sys.executable, "-c", program, "evaluate", "--config", "-", "--text", "-"]
    done = subprocess.run([*command[:-4], "--text=-"], input="abc", capture_output=True, text=True, check=True)
    assert done.stdout == "abc\n"
    done = subprocess.run(command[:-2], input="text: pydoc", capture_output=True, text=True, check=True)
    assert done.stdout == f"{read_text('pydoc')}\n"


def test_byte_order_marks_of_several_files_are_dropped(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}", encoding="utf-8-sig")
    documents = open_source(SourceConfig(name=str(tmp_path / "*.txt")))
    assert [document.text for document in documents] == ["text a", "text b"]


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


def test_a_shell_can_complete_commands_and_options(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print_completion", "shtab-bash"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert "convert" in captured.out
    assert captured.err == ""
    assert subprocess.run(["bash", "-n"], input=captured.out, text=True, check=False).returncode == 0
