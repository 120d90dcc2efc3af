import json
import sys

import pytest

from experiments import cache_quality, cache_speed
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    save_model(tiny_model("llama"), place / "dense")
    (place / "text.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 9)
    return place


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_speeds_are_relative_to_the_full_cache(dense, tmp_path, monkeypatch, capsys):
    flags = ["--layers", 1, "--groups", "kv:6", "--lengths", 8, "--rounds", 1, "--out", tmp_path]
    run(cache_speed, monkeypatch, "--model", dense / "dense", *flags)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["bytes_per_token"] == {"full": 4 * 40, "latent": 4 * 6, "auto": 4 * 26}
    assert row["ratio"]["full"] == 1
    assert row["ratio"]["latent"] > 0
    assert "kv:6 after      8 tokens" in capsys.readouterr().out


def test_quality_is_measured_once(dense, tmp_path, monkeypatch, capsys):
    """In pieces, which give the statistics of the whole; what is there is not measured again."""
    flags = ["--calibration-tokens", 96, "--skip-tokens", 100, "--max-tokens", 64, "--window", 16, "--ratios", 0.6]
    flags += ["--variants", "shared", "values", "--out", tmp_path]
    run(cache_quality, monkeypatch, "--model", dense / "dense", "--text", dense / "text.txt", *flags)
    first, rows = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert first.count("measured ") == 3  # two windows at a time
    assert set(rows) == {"dense", "shared 0.6", "values 0.6"}
    assert rows["dense"]["cached_numbers"] == 3 * 40
    assert rows["shared 0.6"]["cached_numbers"] == 72
    assert rows["values 0.6"]["cached_numbers"] == 3 * 20 + 12
    monkeypatch.setattr(cache_quality, "WINDOWS", 6)
    run(cache_quality, monkeypatch, "--model", dense / "dense", "--text", dense / "text.txt", *flags)
    assert "measured " not in capsys.readouterr().out
    other = tmp_path / "whole"
    run(cache_quality, monkeypatch, "--model", dense / "dense", "--text", dense / "text.txt", *flags[:-1], other)
    assert capsys.readouterr().out.count("measured ") == 1
    whole = json.loads((other / "results.json").read_text())
    assert whole["shared 0.6"]["perplexity"] == pytest.approx(rows["shared 0.6"]["perplexity"], rel=1e-3)
