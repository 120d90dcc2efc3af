"""Where the command line reads and writes: pipes, devices, links, full disks, standard input and output."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from ngc_jax import cli
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


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(dense_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("edge") / "dense"))


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


def test_a_shell_can_complete_commands_and_options(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print_completion", "shtab-bash"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert "convert" in captured.out
    assert captured.err == ""
    assert subprocess.run(["bash", "-n"], input=captured.out, text=True, check=False).returncode == 0
