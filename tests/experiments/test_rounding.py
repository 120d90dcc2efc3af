"""The experiment on what rounding costs groups, on a tiny model."""

import json
import sys

import pytest

from experiments import rounding
from ngc_jax import chain, convert
from ngc_jax.conversion import factorise
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.mark.slow
def test_the_sides_of_groups_are_compared(tmp_path, monkeypatch, capsys):
    model = tiny_model("llama")
    text = tmp_path / "text.txt"
    text.write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 9)
    gauged = chain(factorise("svd_llm", gauge=True))
    places = [str(save_model(model, tmp_path / "dense"))]
    places += [str(save_model(convert(model, gauged, text.read_text(), keep=0.7, window=32), tmp_path / "compact"))]
    arguments = [*places, "--text", str(text), "--tokens", "96", "--window", "32", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["rounding", *arguments, "--out", str(tmp_path / "out")])
    rounding.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["block"].split(".")[1] for row in rows} == {"1"}
    assert all(0 < row["dense"] < 0.1 and 0 < row["output_side"] < 0.1 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
