"""The fuzzer: its short form finds no fault, the same numbers give the same inputs, and it sees planted faults."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.fuzz import __main__ as fuzz
from experiments.fuzz import worker
from experiments.fuzz.gguf import mutate_gguf
from experiments.fuzz.inputs import KINDS, Case, make_case
from experiments.fuzz.mutate import mutate_bytes, mutate_json, mutate_text
from experiments.fuzz.seeds import make_seeds
from experiments.fuzz.worker import judge, outcome_of
from ngc_jax.commands.info import InfoConfig


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    place = tmp_path_factory.mktemp("seeds")
    make_seeds(place)
    return place


def test_the_same_numbers_give_the_same_inputs(seeds, tmp_path):
    for number in range(2 * len(KINDS)):
        contents = []
        for _ in range(2):
            place = tmp_path / "case"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            case = make_case(number, 0, seeds, place)
            files = sorted(path for path in place.rglob("*") if path.is_file())
            contents.append([case.kind, case.command, *(path.read_bytes() for path in files)])
        assert contents[0] == contents[1]


def test_mutations_change_something_and_leave_their_input_alone():
    value = {"a": [1, {"b": "text"}], "c": None}
    kept = json.dumps(value)
    rng = random.Random(0)
    changed = [mutate_json(rng, value) != value for _ in range(50)]
    assert json.dumps(value) == kept
    assert sum(changed) > 40
    assert mutate_bytes(rng, bytes(100), same_length=True) != bytes(100)
    assert len(mutate_bytes(rng, bytes(range(100)), same_length=True)) >= 100
    assert mutate_text(rng, "qkv-o-ug-d")


def _busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (lambda place: 1 / 0, "fault: ZeroDivisionError"),
        (lambda place: (place / ".out-new-x").mkdir() or {}, "fault: .out-new-x was left behind"),
        (lambda place: _busy(5) or {}, "fault: longer than"),
        (lambda place: os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:1:\n") and {}, "fault: noise: thread"),
        (lambda place: json.loads("[" * 100_000), "fault: RecursionError"),
        (lambda place: {}, "accepted"),
    ],
)
def test_planted_faults_are_seen(action, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 1)
    before = signal.signal(signal.SIGPROF, worker._too_long)
    monkeypatch.setattr(InfoConfig, "run", lambda self: action(tmp_path))
    try:
        assert outcome_of(Case("planted", ["info"]), tmp_path).startswith(outcome)
    finally:
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize(
    ("code", "stderr", "written", "outcome"),
    [
        (0, "", {"out"}, "accepted"),
        (2, "ngc-jax: error: no\n", set(), "refused"),
        (2, "load: 3 of 3 done\nngc-jax: error: topology\n  qq--k\n    ^\n", set(), "refused"),
        (2, "ngc-jax: error: no\n", {"out"}, "fault"),
        (2, "", set(), "fault"),
        (2, "ngc-jax: error: no\nmore\n", set(), "fault"),
        (1, "ngc-jax: error: no\n", set(), "fault"),
        (0, "/lib/site.py:5: UserWarning: from elsewhere\n  import site\n", set(), "fault: noise"),
    ],
)
def test_what_is_right_and_what_is_not(code, stderr, written, outcome):
    assert judge(code, stderr, written).startswith(outcome)


@pytest.mark.slow
def test_the_short_form_finds_no_fault(tmp_path, capsys):
    assert fuzz.main(["--count", "150", "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == {"count": 150, "seed": 3, "faults": []}
    assert "| plan |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os; os.kill(os.getpid(), 9)", "fault: the process died"),
        ("import time; time.sleep(60)", "fault: no end within 2 s"),
    ],
)
def test_a_worker_that_dies_or_waits_is_counted_and_its_input_kept(code, outcome, seeds, tmp_path, monkeypatch):
    """The worker is one that begins an input and then does something else."""
    begin = "import json, sys; from pathlib import Path; log = Path(sys.argv[3]); line = {'kind': 'text', "
    begin += "'number': int(sys.argv[5]), 'outcome': 'begun'}; log.write_text(json.dumps(line) + chr(10)); "
    real = subprocess.Popen

    def start(command, **options):
        if command[3] == "run":
            return real([sys.executable, "-c", begin + code, *command[3:]], **options)
        return real(
            [sys.executable, "-c", f"import shutil; shutil.copytree({str(seeds)!r}, {command[4]!r})"], **options
        )

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(fuzz, "PATIENCE", 2)
    assert fuzz.main(["--count", "2", "--out", str(tmp_path / "out")]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [fault["outcome"] for fault in results["faults"]] == [outcome, outcome]
    assert (tmp_path / "out" / "faults" / "1" / "command.json").is_file()


def test_mutated_gguf_headers_differ_and_keep_their_weights(seeds):
    data = (seeds / "model.gguf").read_bytes()
    changed = [mutate_gguf(random.Random(number), data) for number in range(20)]
    assert len(set(changed)) == 20
    assert all(found.startswith(b"GGUF") and found[-1000:] == data[-1000:] for found in changed)


def test_a_worker_writes_nowhere_else(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "mine").write_text("mine")
    code = """
import os, sys
from pathlib import Path
from experiments.fuzz.worker import confine
inside = Path(sys.argv[1])
confine(inside)
outside = [inside.parent / "mine", inside / ".." / "mine", inside.parent / "new"]
actions = [lambda p: p.write_text("x"), lambda p: p.open("a"), lambda p: p.unlink(), lambda p: os.mkdir(p / "x")]
actions += [lambda p: os.rename(inside / "a", p), lambda p: os.open(p, os.O_RDWR | os.O_CREAT), lambda p: p.chmod(0)]
(inside / "a").write_text("1")
os.rename(inside / "a", inside / "b")
open(os.devnull, "w").close()
for path in outside:
    for action in actions:
        try:
            action(path)
        except PermissionError:
            continue
        sys.exit(f"{path} was written")
"""
    root = Path(fuzz.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "inside")], cwd=root, check=True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "mine"]
