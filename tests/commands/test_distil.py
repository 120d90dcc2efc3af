"""Distillation by the command line, end to end on a tiny model."""

import json

import jax
import numpy as np
import pytest

from ngc_jax import cli
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.training import sharding
from tests.models.compact import dense_model
from tests.tiny import random_tokens


@pytest.fixture(autouse=True)
def _replicate_the_vocabulary(monkeypatch):
    # 259 tokens are a prime number.
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("distil")
    dense = dense_model("llama", num_hidden_layers=1)
    save_model(dense, place / "dense")
    save_model(convert(dense, Recipe("svd", keep=0.6, gauge=True), random_tokens(64)), place / "compact", card="x")
    (place / "text.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 30)
    return place


def run(place, out, *flags, model="compact"):
    command = ["distil", str(place / model), "--teacher", str(place / "dense"), "--out", str(place / out)]
    command += ["--text", str(place / "text.txt"), "--evaluation-text", str(place / "text.txt"), "--batch-size", "8"]
    command += [
        "--evaluation-tokens",
        "256",
        "--sequence-length",
        "16",
        "--learning-rate",
        "1e-2",
        "--warmup-steps",
        "1",
    ]
    summary = place / "summary.json"
    code = cli.main([*command, "--json", str(summary), *flags])
    return code, json.loads(summary.read_text()) if code == 0 else {}


def test_a_distilled_model_is_nearer_to_its_teacher_and_what_it_says_it_is(place):
    code, summary = run(place, "run", "--steps", "12", "--evaluate-every", "5")
    assert code == 0
    assert summary["losses"][-1] < 0.8 * summary["losses"][0]
    assert list(summary["perplexities"]) == ["0", "5", "10", "12"]
    assert (
        cli.main(
            [
                "evaluate",
                str(place / "run" / "model"),
                "--text",
                str(place / "text.txt"),
                "--window",
                "1024",
                "--max-tokens",
                "256",
                "--json",
                str(place / "evaluation.json"),
            ]
        )
        == 0
    )
    evaluation = json.loads((place / "evaluation.json").read_text())
    np.testing.assert_allclose(evaluation["perplexity"], summary["perplexities"]["12"], rtol=1e-4)
    before, after = load_model(str(place / "compact")), load_model(str(place / "run" / "model"))
    assert before.plan == after.plan
    np.testing.assert_array_equal(before.params["embed"]["embedding"], after.params["embed"]["embedding"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params["groups"], after.params["groups"])
    assert min(jax.tree.leaves(moved)) > 0
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert list((place / "run" / "tensorboard").iterdir())


@pytest.mark.slow
def test_the_distance_of_the_spectra_is_in_the_metrics(place):
    flags = ["--stability-weight", "0.5", "--stability-directions", "2", "--stability-tokens", "3", "--remat"]
    code, summary = run(place, "spectra", "--steps", "2", "--evaluation-tokens", "0", *flags)
    assert code == 0
    assert summary["stability_weight"] == 0.5
    for line in (place / "spectra" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert metrics["stability"] > 0
        np.testing.assert_allclose(metrics["loss"], metrics["divergence"] + 0.5 * metrics["stability"], rtol=1e-5)


def test_a_dry_run_trains_nothing(place, capsys):
    code, summary = run(place, "dry", "--dry-run", "--fsdp", "4", "--tensor", "2", "--data", "1")
    assert code == 0
    assert summary["bytes_per_device"]["arguments"] > 0
    assert "output_states q: P(" in capsys.readouterr().out.replace("PartitionSpec(", "P(")
    assert not (place / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--divergence", "0"], "no loss has a weight"),
        (["--batch-size", "3"], "cannot be split over 8 devices"),
        (["--sequence-length", "4096"], "a batch needs"),
        (["--data-options", "{packing: folded}"], "packing"),
        (["--data-options", "{paking: pack}"], "data_options does not fit"),
        (["--optimizer", "adamm"], "no optimiser"),
        (["--process-count", "2"], "coordinator"),
        (["--learning-rate", "1e30", "--clip-norm", "1e30", "--schedule", "constant"], "not finite at step"),
    ],
)
def test_bad_input_is_refused(place, flags, says, capsys):
    assert run(place, "bad", "--steps", "8", *flags)[0] == 2
    assert says in capsys.readouterr().err


def test_a_dense_model_has_no_states(place, capsys):
    assert run(place, "bad2", model="dense")[0] == 2
    assert "dense model" in capsys.readouterr().err
