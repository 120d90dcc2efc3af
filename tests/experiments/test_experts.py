"""The experiment with experts, on a model that is hardly trained."""

import argparse
import json

import pytest

from experiments.experts.__main__ import TOPOLOGIES, run


@pytest.mark.slow
def test_rows_are_written_once(tmp_path) -> None:
    settings = {"out": str(tmp_path), "steps": 2, "seed": 0, "keeps": [0.5], "priors": False, "short_tokens": 512}
    sizes = {"calibration_tokens": 1024, "evaluation_tokens": 1024}
    names = ["private", "shared u, shared g", "chosen by loss"]
    run(argparse.Namespace(**settings, **sizes, rows=names[:2]))
    first = json.loads((tmp_path / "results.json").read_text())
    done = run(argparse.Namespace(**settings, **sizes, rows=names))
    assert done["rows"][:2] == first["rows"]
    assert [row["shared groups"] for row in done["rows"][:2]] == [0, 8]  # u and g of four layers
    assert all(0.49 < row["kept"] <= 0.5 for row in done["rows"])
    assert (tmp_path / "experts.png").exists()
    assert "| private |" in (tmp_path / "table.md").read_text()
    assert set(names) <= set(TOPOLOGIES)
