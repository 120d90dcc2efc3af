"""Runs that are interrupted continue with the same results and ask nothing twice."""

import dataclasses
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
from ngc_jax.evaluation.specs import GenerationSpec, MultipleChoiceSpec
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model

SPEC = MultipleChoiceSpec("colours", "Q: {{ question }}\nA:")
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


SUMS = [{"question": f"{n} + {n % 7}", "answer": str(n + n % 7)} for n in range(100)]
SAMPLED = GenerationSpec(
    "sums", "{{ question }} =", answer="last_number", samples=2, temperature=1.0, max_new_tokens=6, until=("\n",)
)


def test_generated_answers_are_counted_and_continue_with_the_same_samples(tmp_path, monkeypatch):
    model = tiny_model()
    whole = run_task(model, SAMPLED, SUMS[:5], tmp_path / "whole", how=HOW)
    assert set(whole.scores) == {"last_number_pass@1", "last_number_pass@2"}
    summary = whole.summary()
    assert 1 <= summary["tokens"] <= 6
    assert 0 <= summary["truncated"]["mean"] <= 1
    lines = (tmp_path / "whole" / "responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    assert summary["tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 10)
    assert summary["truncated"]["mean"] == pytest.approx(sum(row["finish"] == "length" for row in rows) / 10)
    # The first half of the answers, then the rest of them.
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "responses.jsonl").write_text("\n".join(lines[:6]) + "\n")
    half = run_task(model, SAMPLED, SUMS[:5], tmp_path / "half", how=HOW)
    assert half.reused == 5
    assert half.scores == whole.scores
    assert (tmp_path / "half" / "responses.jsonl").read_text().splitlines() == lines
    with pytest.raises(UsageError, match="another task"):
        run_task(model, dataclasses.replace(SAMPLED, seed=1), SUMS[:5], tmp_path / "half", how=HOW)
    run_task(model, dataclasses.replace(SAMPLED, seed=1), SUMS[:5], tmp_path / "seed", how=HOW)
    other = (tmp_path / "seed" / "responses.jsonl").read_text().splitlines()
    assert other[1:] != lines[1:]


def test_a_run_that_is_not_finished_has_no_scores(tmp_path, monkeypatch):
    model = tiny_model()
    run_task(model, SPEC, DOCUMENTS[:2], tmp_path, how=HOW)
    assert (tmp_path / "scores.json").exists()
    monkeypatch.setattr(predict, "_answer_likelihoods", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_task(model, SPEC, DOCUMENTS[:2], tmp_path, how=RunOptions(2, overwrite=True))
    assert not (tmp_path / "scores.json").exists()


def test_the_command_generates_and_compares(place, capsys):
    (place / "sums.jsonl").write_text("".join(json.dumps(document) + "\n" for document in SUMS))
    (place / "sums.yaml").write_text(
        'name: sums\nsource: sums.jsonl\ntemplate: "{{ question }} ="\nmetric: exact_match\nanswer: number\n'
        "max_new_tokens: 8\npass_at: [1]\n"
    )
    words = ["evaluate", str(place / "model"), "--task", str(place / "sums.yaml"), "--limit", "3"]
    assert cli.main([*words, "--out", str(place / "one")]) == 0
    shown = capsys.readouterr().out
    assert "truncated" in shown
    assert "tokens per answer" in shown
    chat = [*words, "--chat", "--system", "Be brief.", "--shots", "0", "--max-new-tokens", "4"]
    summary = place / "two.json"
    assert cli.main([*chat, "--out", str(place / "two"), "--against", str(place / "one"), "--json", str(summary)]) == 0
    shown = capsys.readouterr().out
    assert "against" in shown
    assert "McNemar" in shown
    found = json.loads(summary.read_text())
    assert (found["settings"]["chat"], found["settings"]["max_new_tokens"]) == (True, 4)
    assert set(found["against"]["scores"]) == {"strict", "flexible"}
    assert found["against"]["scores"]["strict"]["p_value"] == 1.0
    sampled = [*words, "--samples", "2", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"]
    assert cli.main([*sampled, "--out", str(place / "many")]) == 0
    assert "pass@1" in capsys.readouterr().out
    for more, message in (
        (["--against", str(place / "one"), "--out", str(place / "one")], "name another run"),
        (["--against", str(place / "one"), "--out", str(place / "x"), "--limit", "2"], "on the same documents"),
        (["--against", str(place / "none"), "--out", str(place / "x")], "finished evaluation"),
        (["--samples", "2", "--out", str(place / "x")], "at temperature 0"),
        (["--system", "Be brief.", "--out", str(place / "x")], "which only chats have"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (place / "x").exists()
    colours = ["evaluate", str(place / "model"), "--task", str(place / "colours.yaml")]
    assert cli.main([*colours, "--samples", "2"]) == 2
    assert "--samples is of generated answers" in capsys.readouterr().err
    assert cli.main(["evaluate", str(place / "model"), "--max-new-tokens", "2"]) == 2
    assert "--max-new-tokens is an option of tasks" in capsys.readouterr().err


def start(lines: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "ngc_jax", *lines], env={**os.environ})


def kill_after(process: subprocess.Popen[bytes], file: Path, count: int) -> None:
    """SIGKILL once a file has more than this number of lines."""
    deadline = time.monotonic() + 300
    while not (file.exists() and file.read_bytes().count(b"\n") > count) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_hundred_generated_answers_survive_three_kills(place):
    """Three times SIGKILL, at a tenth, at four tenths and at seven tenths of the answers: the file is the same."""
    (place / "sums.jsonl").write_text("".join(json.dumps(document) + "\n" for document in SUMS))
    (place / "sums.yaml").write_text(
        'name: sums\nsource: sums.jsonl\ntemplate: "{{ question }} ="\nmetric: exact_match\nanswer: last_number\n'
        "max_new_tokens: 64\ntemperature: 1.0\nseed: 7\n"
    )
    words = ["evaluate", str(place / "model"), "--task", str(place / "sums.yaml"), "--batch-size", "2"]
    whole, killed = place / "whole" / "responses.jsonl", place / "killed" / "responses.jsonl"
    assert start([*words, "--out", str(whole.parent)]).wait() == 0
    counts = []
    for share in (10, 40, 70):
        kill_after(start([*words, "--out", str(killed.parent)]), killed, share)
        counts.append(killed.read_bytes().count(b"\n"))
        assert not (killed.parent / "scores.json").exists()
    assert counts == sorted(set(counts))
    assert counts[-1] < 101
    assert start([*words, "--out", str(killed.parent)]).wait() == 0
    assert whole.read_bytes().count(b"\n") == 101
    assert killed.read_bytes() == whole.read_bytes()
    assert (killed.parent / "scores.json").read_bytes() == (whole.parent / "scores.json").read_bytes()


@pytest.mark.slow
def test_a_killed_command_continues(place):
    """SIGKILL once some responses are on the disk; the same command then ends as an undisturbed run."""
    assert cli.main(command(place, "whole", "whole.json")) == 0
    lines = command(place, "killed", "killed.json")
    file = place / "killed" / "responses.jsonl"
    kill_after(start(lines), file, 1)
    before = file.read_bytes().count(b"\n") - 1
    assert cli.main(lines) == 0
    killed, whole = (json.loads((place / name).read_text()) for name in ("killed.json", "whole.json"))
    assert killed["reused"] == before
    assert killed["scores"] == whole["scores"]
