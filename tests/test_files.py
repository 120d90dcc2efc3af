"""Writing whole or not at all, and by one process at a time, whatever happens to the process."""

import json
import subprocess
import sys

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.files import atomic_directory, atomic_file, lock_directory, write_json, write_text

REPLACE_AND_DIE = """
import os, sys
from pathlib import Path
from ngc_jax import files
rename, count = Path.rename, 0
def rename_once(self, target):
    global count
    count += 1
    if count > int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return rename(self, target)
Path.rename = rename_once
with files.atomic_directory(sys.argv[1], overwrite=True) as directory:
    (directory / "config.json").write_text("new")
    (directory / "model.safetensors").write_text("new")
"""


def model_at(directory, content):
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_process_leaves_a_directory_that_the_next_one_puts_in_order(tmp_path, renames):
    out = model_at(tmp_path / "a[b]", "old")
    killed = subprocess.run([sys.executable, "-c", REPLACE_AND_DIE, str(out), str(renames)], check=False)
    assert killed.returncode == -9
    assert out.exists() == (renames == 0)
    with pytest.raises(FileNotFoundError), atomic_directory(out, overwrite=True):
        (out / "none").read_text()
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a[b]"]
    with atomic_directory(out, overwrite=True) as directory:
        model_at(directory / "inside", "new")
    assert (out / "inside").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["a[b]"]


def test_a_directory_that_is_being_made_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "out", overwrite=False) as first:
        (first / "mine").write_text("1")
        with atomic_directory(tmp_path / "out", overwrite=False) as second:
            assert (first / "mine").exists()
            (second / "config.json").write_text("2")
            (second / "model.safetensors").write_text("2")
        (first / "model.safetensors").write_text("1")
        (tmp_path / "out" / "config.json").unlink()
        (tmp_path / "out" / "model.safetensors").unlink()
    assert [path.name for path in (tmp_path / "out").iterdir()]


def test_a_link_to_a_directory_is_kept(tmp_path):
    target, link = model_at(tmp_path / "target", "old"), tmp_path / "link"
    link.symlink_to("target")
    with pytest.raises(UsageError, match="exists"), atomic_directory(link, overwrite=False):
        pass
    with atomic_directory(link, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_killed_process_leaves_a_file_that_the_next_one_removes(tmp_path):
    die = "import os, sys; from ngc_jax import files\nwith files.atomic_file(sys.argv[1]): os.kill(os.getpid(), 9)"
    file = tmp_path / ("a[b]" + "x" * 251)
    file.write_text("old")
    assert subprocess.run([sys.executable, "-c", die, str(file)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_file(file) as first:
        write_text(file, "new")
        assert first.exists()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    hold = "import sys, ngc_jax.files\nwith ngc_jax.files.lock_directory(sys.argv[1]): print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(UsageError, match=f"process {holder.pid};"), lock_directory(tmp_path / "run"):
        pass
    holder.kill()
    holder.communicate()
    with lock_directory(tmp_path / "run"), pytest.raises(UsageError), lock_directory(tmp_path / "run"):
        pass


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x.json", "\ud800")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_locked_directory_that_was_made_in_vain_is_removed(tmp_path):
    with pytest.raises(UsageError), lock_directory(tmp_path / "runs" / "first"):
        raise UsageError("refused")
    assert not any(tmp_path.iterdir())
    run = tmp_path / "run"
    with lock_directory(run):
        (run / "metrics.jsonl").touch()
    with pytest.raises(UsageError), lock_directory(run):
        raise UsageError("refused")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl"]
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError), lock_directory(run):  # which was there before
        raise UsageError("refused")
    assert run.is_dir()
