"""What a run has learnt is kept: data that end early, damaged checkpoints, two runs in one place, kills, full disks."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.files import lock_directory
from ngc_jax.models.save import save_model
from ngc_jax.training import fit, loop, metrics, sharding
from ngc_jax.training.checkpoints import Checkpoints
from tests.models.compact import dense_model
from tests.training.setting import each_step_compiled_once

ARCHITECTURE = (
    "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}"
)
# Orbax leaves the other reads of a checkpoint behind when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lost")
    save_model(dense_model("llama", num_hidden_layers=1), place / "dense")
    (place / "text.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 20)
    return place


@pytest.fixture(scope="module", autouse=True)
def _each_step_compiled_once():
    with each_step_compiled_once():
        yield


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))


def command(place, out, steps, *flags, name="train"):
    text = str(place / "text.txt")
    flags = ["--out", str(out), "--text", text, "--evaluation-text", text, "--steps", str(steps), *flags]
    flags += ["--batch-size", "2", "--sequence-length", "16"]
    if name == "train":
        flags += ["--tokenizer", str(place / "dense"), "--architecture", ARCHITECTURE]
    return [name, *flags]


def run(*arguments, **options):
    return cli.main(command(*arguments, **options))


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    return [line["step"] for line in lines(out) if "loss" in line]


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.is_dir())


QUIET = ("--evaluation-tokens", "0")


def test_data_that_end_before_the_steps_end_the_run_well(place, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data-options", "{epochs: 1}", "--tokens", "200", "--evaluation-tokens", "64"]
    for _ in range(2):  # and the same command again finds it finished
        assert run(place, out, 1000, *flags) == 0
        printed = capsys.readouterr().out
        assert "the data end after 6 of 1,000 steps" in printed
        assert steps_of(out) == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in lines(out) if "perplexity" in line] == [0, 6]
        assert checkpoints(out) == ["6"]
        assert (out / "model" / "model.safetensors").is_file()


def test_batches_that_end_unforeseen_end_the_run_too(place, tmp_path, monkeypatch):
    restrict = loop.Placed.batch
    taken = []

    def batch(self, rows):
        taken.append(1)
        return restrict(self, rows)

    monkeypatch.setattr(loop.Placed, "batch", batch)
    monkeypatch.setattr("ngc_jax.training.data.PipelineIterator.__next__", _ends_after(4))
    assert run(place, tmp_path / "run", 9, *QUIET) == 0
    assert len(taken) == 4
    assert checkpoints(tmp_path / "run") == ["4"]


def _ends_after(count):
    from ngc_jax.training.data import PipelineIterator

    original, left = PipelineIterator.__next__, [count]

    def take(self):
        if not left[0]:
            raise StopIteration
        left[0] -= 1
        return original(self)

    return take


@pytest.mark.parametrize("damage", ["state", "settings", "data", "empty", "null"])
def test_a_damaged_newest_checkpoint_is_moved_aside_and_its_step_written_again(place, tmp_path, damage, caplog):
    out = tmp_path / "run"
    assert run(place, out, 6, "--save-every", "2", *QUIET) == 0
    whole = load_file(out / "model" / "model.safetensors")
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "6")
    if damage == "empty":
        shutil.rmtree(out / "checkpoints" / "4")
        (out / "checkpoints" / "4").mkdir()
    elif damage == "null":  # JSON, but no position
        (out / "checkpoints" / "4" / "data" / "metadata").write_text("null")
    else:
        for file in (out / "checkpoints" / "4" / damage).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    for attempt in range(2):
        caplog.clear()
        assert run(place, out, 6, "--save-every", "2", *QUIET) == 0
        assert ("cannot be read" in caplog.text) == (attempt == 0)
    assert checkpoints(out) == ["2", "4", "6", "unreadable-4-0"]
    for name, tensor in load_file(out / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, whole[name])
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_saves_first_and_evaluates_nothing(place, tmp_path, monkeypatch):
    out, order = tmp_path / "run", []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a: (order.append("save"), save(self, *a))[1])
    build = fit.perplexity_on

    def perplexity_on(*arguments):
        evaluate = build(*arguments)
        return lambda trained: (order.append("evaluate"), evaluate(trained))[1]

    monkeypatch.setattr(fit, "perplexity_on", perplexity_on)
    flags = ("--evaluate-every", "2", "--save-every", "2", "--evaluation-tokens", "64")
    assert run(place, out, 4, *flags) == 0
    assert order == ["evaluate", "save", "evaluate", "save", "evaluate"]
    order.clear()
    agreed = iter([False, False, True])  # before the first step, and after each
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_agreed", lambda stopped: next(agreed))
        assert run(place, out, 4, *flags) == 0
    assert order == ["evaluate", "save"]
    assert checkpoints(out) == ["2"]
    assert run(place, out, 4, *flags) == 0  # what was due is made up for
    assert [line["step"] for line in lines(out) if "perplexity" in line] == [0, 2, 4]


def test_a_second_run_in_one_directory_is_refused(place, tmp_path, capsys):
    for out, name in ((tmp_path / "run", "train"), (tmp_path / "compare", "compare")):
        with lock_directory(out):
            compare = ["compare", str(place / "dense"), "--out", str(out)]
            arguments = command(place, out, 2, *QUIET) if name == "train" else compare
            assert cli.main(arguments) == 2
            assert [path.name for path in out.iterdir()] == [".lock"]
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize("where", ["out", "model", "checkpoints"])
def test_places_that_cannot_be_used_are_found_before_training(place, tmp_path, capsys, where, monkeypatch):
    out = tmp_path / "run"
    if where == "out":
        out.write_text("mine")
    elif where == "model":
        (out / "model").mkdir(parents=True)
        (out / "model" / "notes.txt").write_text("mine")
    else:
        out.mkdir()
        (out / "checkpoints").write_text("mine")
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("training was begun"))
    assert run(place, out, 3, *QUIET) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sigterm_while_the_model_is_written_leaves_none_and_the_same_command_writes_it(place, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did nothing")

    with monkeypatch.context() as patch:
        patch.setattr("ngc_jax.models.save._write_tensors", stop)
        assert run(place, out, 3, *QUIET) == 143
    assert not [path for path in out.iterdir() if "model" in path.name]
    assert run(place, out, 3, *QUIET) == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert steps_of(out) == [1, 2, 3]


def test_metrics_are_cut_back_to_the_step_that_is_resumed(place, tmp_path):
    out = tmp_path / "run"
    assert run(place, out, 4, "--save-every", "2", *QUIET) == 0
    shutil.rmtree(out / "checkpoints" / "4")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # of a process that was killed
    assert run(place, out, 4, "--save-every", "2", *QUIET) == 0
    assert steps_of(out) == [1, 2, 3, 4]


def test_the_summary_of_a_resumed_run_is_that_of_the_whole(place, tmp_path):
    out, file = tmp_path / "run", tmp_path / "summary.json"
    flags = ("--save-every", "2", "--evaluation-tokens", "64", "--json", str(file))
    assert run(place, out, 4, *flags) == 0
    whole = json.loads(file.read_text())
    shutil.rmtree(out / "checkpoints" / "4")
    assert run(place, out, 4, *flags) == 0
    resumed = json.loads(file.read_text())
    assert len(whole["losses"]) == 4
    assert list(whole["perplexities"]) == ["0", "4"]
    for name in ("losses", "perplexities", "step"):
        assert resumed[name] == whole[name]


def test_a_full_disk_under_tensorboard_ends_the_run_with_one_line(place, tmp_path, monkeypatch, capsys):
    def full(self, event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "_FLUSH_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
        assert run(place, tmp_path / "run", 30, *QUIET) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("done")]
    assert len(error) == 1
    assert "tensorboard: No space left on device; make space" in error[0]
    assert run(place, tmp_path / "run", 4, *QUIET) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_refused_run_leaves_nothing(place, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    assert run(place, out, 3, "--data-options", "{paking: pack}") == 2
    assert list(tmp_path.iterdir()) == []
    assert run(place, out, 3, *QUIET) == 0
    before = sorted(out.rglob("*"))
    assert run(place, out, 3, "--seed", "1", *QUIET) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_a_lock_whose_file_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".lock").unlink()  # its holder ends
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(UsageError, match=f"in use by process {os.getpid()}")
    with lock_directory(tmp_path), refused, lock_directory(tmp_path):
        pytest.fail("locked twice")
    assert list(tmp_path.iterdir()) == []


def test_a_distillation_notices_that_its_model_was_converted_again(place, tmp_path, capsys):
    def convert(keep):
        flags = ["--method", "svd", "--keep", keep, "--overwrite", "--out", str(tmp_path / "compact")]
        assert cli.main(["convert", str(place / "dense"), *flags]) == 0

    def distil(steps=2):
        flags = [str(tmp_path / "compact"), *QUIET]
        return run(place, tmp_path / "run", steps, *flags, name="distil")

    convert("0.6")
    assert distil() == 0
    assert distil() == 0  # the same model: nothing is wrong
    convert("0.6000001")  # the same shapes
    capsys.readouterr()
    assert distil() == 2
    assert "fingerprint of the model" in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_cut(place, tmp_path, capsys):
    assert run(place, tmp_path / "run", 3, "--warmup-steps", "100", *QUIET) == 0
    assert "the warm-up of 100 steps is cut to the run's 3" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting needs root")
def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_space(place, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        assert run(place, small / "run", 60, "--save-every", "2", "--keep-checkpoints", "50", *QUIET) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("done")]
        assert len(error) == 1
        assert "No space left on device; make space" in error[0]
        shutil.copytree(small / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    assert run(place, tmp_path / "run", 60, "--save-every", "2", "--keep-checkpoints", "50", *QUIET) == 0
    assert steps_of(tmp_path / "run") == list(range(1, 61))
    assert Path(tmp_path / "run" / "model").is_dir()
