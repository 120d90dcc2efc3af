"""Runs that are interrupted continue with the same results and ask nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.evaluation import predict
from ngc_jax.evaluation.run_tasks import RunOptions, run_task
from ngc_jax.evaluation.tasks import TaskSpec
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model

SPEC = TaskSpec("colours", "Q: {{ question }}\nA:", "multiple_choice")
DOCUMENTS = [
    {"question": f"Number {n}" + "?" * (7 * n), "choices": ["red", "blue or so", "x" * n + "y"], "label": n % 3}
    for n in range(5)
]
HOW = RunOptions(batch_size=2)


def test_an_interrupted_run_continues_with_what_is_missing(tmp_path, monkeypatch):
    model, asked = tiny_model(), []
    answer = predict._answer_likelihoods

    def counted(model, requests, *rest):
        asked.extend(request.id for request in requests)
        if len(asked) > 7 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return answer(model, requests, *rest)

    monkeypatch.setattr(predict, "_answer_likelihoods", counted)
    with pytest.raises(KeyboardInterrupt):
        run_task(model, SPEC, DOCUMENTS, tmp_path / "run", how=HOW)
    file = tmp_path / "run" / "responses.jsonl"
    kept = {json.loads(line)["id"] for line in file.read_text().splitlines()[1:]}
    assert 0 < len(kept) < 15
    file.write_bytes(file.read_bytes() + b'{"id": "4/2", "log_like')  # killed while writing
    (tmp_path / "again").touch()
    asked.clear()
    reports = []
    again = run_task(model, SPEC, DOCUMENTS, tmp_path / "run", how=HOW, progress=lambda *a: reports.append(a))
    assert again.reused == len(kept)
    assert not kept & set(asked)
    assert reports[-1] == ("evaluate", 15, 15)
    whole = run_task(model, SPEC, DOCUMENTS, tmp_path / "whole", how=HOW)
    assert again.scores == whole.scores
    assert sorted(file.read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "responses.jsonl").read_text().splitlines()
    )
    asked.clear()
    assert run_task(model, SPEC, DOCUMENTS, tmp_path / "run", how=HOW).reused == 15
    assert asked == []


def test_responses_of_another_run_are_refused_and_can_be_discarded(tmp_path):
    model = tiny_model()
    run_task(model, SPEC, DOCUMENTS[:1], tmp_path, how=HOW)
    with pytest.raises(UsageError, match="another documents"):
        run_task(model, SPEC, DOCUMENTS[:2], tmp_path, how=HOW)
    with pytest.raises(UsageError, match="another model"):
        run_task(model, SPEC, DOCUMENTS[:1], tmp_path, settings={"model": "other"}, how=HOW)
    assert run_task(model, SPEC, DOCUMENTS[:2], tmp_path, how=RunOptions(2, overwrite=True)).reused == 0
    (tmp_path / "responses.jsonl").write_text("something else\n")
    with pytest.raises(UsageError, match="is not a file of responses"):
        run_task(model, SPEC, DOCUMENTS[:2], tmp_path, how=HOW)


def command(tmp_path: Path, out: str, summary: str) -> list[str]:
    task = ["evaluate", str(tmp_path / "model"), "--task", str(tmp_path / "colours.yaml"), "--batch-size", "2"]
    return [*task, "--out", str(tmp_path / out), "--json", str(tmp_path / summary)]


@pytest.fixture
def place(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "colours.yaml").write_text(
        'name: colours\nsource: data.jsonl\ntemplate: "Q: {{ question }}\\nA:"\nmetric: multiple_choice\n'
    )
    return tmp_path


def test_the_command_evaluates_a_task(place, capsys):
    assert cli.main([*command(place, "run", "summary.json"), "--limit", "2", "--shots", "1"]) == 0
    summary = json.loads((place / "summary.json").read_text())
    assert (summary["documents"], summary["shots"], summary["reused"]) == (2, 1, 0)
    assert set(summary["scores"]) == {"acc", "acc_norm"}
    low, high = summary["scores"]["acc"]["interval"]
    assert low <= summary["scores"]["acc"]["mean"] <= high
    assert "acc_norm" in capsys.readouterr().out
    assert cli.main(["evaluate", str(place / "model"), "--limit", "2"]) == 2
    assert "add --task" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_continues(place):
    """SIGKILL once some responses are on the disk; the same command then ends as an undisturbed run."""
    assert cli.main(command(place, "whole", "whole.json")) == 0
    lines = command(place, "killed", "killed.json")
    process = subprocess.Popen([sys.executable, "-m", "ngc_jax", *lines], env={**os.environ})
    file, deadline = place / "killed" / "responses.jsonl", time.monotonic() + 300
    while not (file.exists() and file.read_bytes().count(b"\n") > 1) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes().count(b"\n") - 1
    assert cli.main(lines) == 0
    killed, whole = (json.loads((place / name).read_text()) for name in ("killed.json", "whole.json"))
    assert killed["reused"] == before
    assert killed["scores"] == whole["scores"]
