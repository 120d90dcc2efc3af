"""The experiment on bytes, on a tiny model."""

import csv
import json

import pytest

from experiments import bytes as experiment
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.mark.slow
def test_rows_are_counted_resumed_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "DENSE", ("float32", "int4"))
    monkeypatch.setattr(experiment, "GROUPED", ("bfloat16", "int4"))
    model = str(save_model(tiny_model(), tmp_path / "dense"))
    text = tmp_path / "text.txt"
    text.write_text("Groups of neurons exchange signals; a weight is what two states make of each other.\n" * 30)
    arguments = ["--models", model, "--text", str(text), "--out", str(tmp_path / "out"), "--quick"]
    experiment.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["form"], row["storage"]): row for row in results["rows"]}
    assert set(rows) == {("dense", "float32"), ("dense", "int4")} | {
        (form, storage) for form in experiment.FORMS for storage in ("bfloat16", "int4")
    }
    for form in experiment.FORMS:
        assert rows[form, "int4"]["bytes"] < rows[form, "bfloat16"]["bytes"] < rows["dense", "float32"]["bytes"]
    assert rows["dense", "int4"]["parameters"] == rows["dense", "float32"]["parameters"]
    assert (tmp_path / "out" / "bytes.png").stat().st_size > 10_000
    with (tmp_path / "out" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    monkeypatch.setattr(experiment.Setting, "evaluate", lambda *_: pytest.fail("a finished row is run again"))
    experiment.main(arguments)


def test_the_best_of_each_size_is_marked():
    rows = [
        {"model": "m", "form": form, "keep": 1.0, "storage": storage, "bytes": size, "perplexity": perplexity}
        for form, storage, size, perplexity in (
            ("dense", "float32", 400e6, 10.0),
            ("dense", "int4", 100e6, 11.0),
            ("ngc", "int8", 150e6, 12.0),
        )
    ]
    lines = experiment.markdown(rows).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.endswith("| yes |")] == ["dense", "dense"]
    assert "| ngc | 1 | int8 | 150.0 | 12.000 | 0.1823 |  |" in lines
    chart = experiment.picture(rows, "m")
    assert [series.name for series in chart.series] == ["dense", "ngc 1"]
