"""The comparison, end to end on a tiny model."""

import json
import math

import pytest
import yaml

from ngc_jax import cli
from ngc_jax.commands import compare
from ngc_jax.commands.conversion_options import flags_of, recipe_of
from ngc_jax.conversion import Recipe
from ngc_jax.models.save import save_model
from ngc_jax.reporting.comparison import excess, markdown
from tests.models.compact import dense_model

VARIANTS = {
    "ngc": {"method": "ngc", "rounds": 1},
    "svd_llm": {"method": "svd_llm"},
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd", "keep": [0.5]},
    "svd_llm + gauge": {"method": "svd_llm", "gauge": True, "keep": [0.5], "section": "levers"},
    "ngc, diagonal": {"method": "ngc", "rounds": 0, "gradients": "diagonal", "keep": [0.5], "section": "levers"},
    "auto": {"method": "ngc", "rounds": 0, "topology": "auto", "keep": [0.5], "section": "topologies"},
    "ngc on other": {"method": "ngc", "rounds": 0, "text": "{other}", "keep": [0.5], "section": "texts"},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison: its flags, its directory and its results."""
    place = tmp_path_factory.mktemp("compare")
    dense = str(save_model(dense_model("llama"), place / "dense"))
    for name, line in (
        ("text", "Groups exchange signals; a weight is what two states make of each other.\n"),
        ("other", "The quick brown fox jumps over the lazy dog, and the dog does not mind it.\n"),
    ):
        (place / f"{name}.txt").write_text(line * 12)
    variants = json.loads(json.dumps(VARIANTS).replace("{other}", str(place / "other.txt")))
    config = place / "compare.yaml"
    config.write_text(yaml.safe_dump({"variants": variants, "keep": [0.7, 0.5], "window": 32}))
    flags = ["compare", dense, "--config", str(config), "--out", str(place / "out"), "--text", str(place / "text.txt")]
    flags += ["--evaluation-text", str(place / "text.txt"), "--skip-tokens", "96", "--max-tokens", "96"]
    flags += ["--calibration-tokens", "96", "--gradient-tokens", "64"]
    assert cli.main(flags) == 0
    return flags, place / "out", json.loads((place / "out" / "results.json").read_text())


def test_every_variant_is_there_at_every_keep_ratio_within_its_budget(compared):
    _, _, results = compared
    found = {(row["variant"], row["keep"]) for row in results["entries"]}
    expected = {(name, keep) for name, options in VARIANTS.items() for keep in options.get("keep", [0.7, 0.5])}
    assert found == expected
    for row in results["entries"]:
        assert row["stored_parameters"] <= row["keep"] * results["dense"]["block_parameters"]
        assert math.isfinite(row["perplexity"])
        assert row["multiply_adds"] <= results["dense"]["multiply_adds"] * 2
        assert {"measure", "convert"} == set(row["seconds"])


def test_tables_and_pictures_are_written(compared):
    _, out, results = compared
    text = (out / "results.md").read_text()
    assert text == markdown(results)
    for heading in ("Perplexity by keep ratio", "fraction of the best baseline", "Levers", "Topologies", "texts"):
        assert heading in text
    for picture in ("pareto.png", "levers.png", "ranks.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not (out / "statistics").exists() or not list((out / "statistics").iterdir())


def test_the_fraction_is_that_of_the_best_baseline(compared):
    _, _, results = compared
    dense = results["dense"]
    rows = {(row["variant"], row["keep"]): row for row in results["entries"]}
    best = min(excess(rows[name, 0.7], dense) for name in ("svd_llm", "svd"))
    fraction = excess(rows["ngc", 0.7], dense) / best
    (line,) = [
        line for line in markdown(results).splitlines() if line.startswith("| `ngc` |") and f"{fraction:.3f}" in line
    ]
    assert line.split("|")[2].strip() == f"{fraction:.3f}"


def test_a_second_run_only_does_what_is_missing(compared, monkeypatch):
    flags, out, results = compared
    entry = out / "entries" / "svd-0.5.json"
    before = {file.name: file.stat().st_mtime_ns for file in (out / "entries").iterdir()}
    entry.unlink()
    assert cli.main(flags) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (out / "entries").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"svd-0.5.json"}
    again = json.loads((out / "results.json").read_text())
    for old, new in zip(results["entries"], again["entries"], strict=True):
        assert new["perplexity"] == old["perplexity"]


def test_costs_that_an_interrupted_run_did_not_measure_are_measured(compared, monkeypatch, tmp_path):
    flags, out, _ = compared
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump({"variants": {"svd": {"method": "svd", "cost": True}}, "keep": [0.7, 0.5]}))
    flags = [str(config) if flag.endswith(".yaml") else flag for flag in flags] + ["--window", "32"]
    measured, in_own_process = [], compare.measure_cost

    def interrupted(config, entry, window):
        raise KeyboardInterrupt

    def measure(config, entry, window):
        measured.append((entry.variant, entry.recipe.keep))
        return {"seconds": 1.5, "peak_bytes": 2**20}

    monkeypatch.setattr(compare, "measure_cost", interrupted)
    assert cli.main(flags) != 0
    monkeypatch.setattr(compare, "measure_cost", measure)
    for _ in range(2):
        assert cli.main(flags) == 0
    assert measured == [("svd", 0.7)]
    file = out / "entries" / "svd-0.7.json"
    row = json.loads(file.read_text())
    assert row["cost"] == {"seconds": 1.5, "peak_bytes": 2**20}

    del row["cost"]
    file.write_text(json.dumps(row))
    monkeypatch.setattr(compare, "measure_cost", in_own_process)
    assert cli.main(flags) == 0
    cost = json.loads(file.read_text())["cost"]
    assert cost["seconds"] > 0
    assert 2**27 < cost["peak_bytes"] < 2**36


@pytest.mark.parametrize(
    ("variants", "problem"),
    [
        ({"a": {"method": "magic"}}, "magic"),
        ({"a": {"method": "svd", "shape": 3}}, "no option 'shape'"),
        ({"a": {"method": "svd", "section": "elsewhere"}}, "section 'elsewhere'"),
        ({"a": {"method": "svd", "keep": [1.5]}}, "outside"),
        ({"a": {"method": "svd", "topology": "auto"}}, "allocation 'loss'"),
    ],
)
def test_bad_variants_are_refused_before_anything_runs(variants, problem, tmp_path, capsys):
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump({"variants": variants}))
    assert cli.main(["compare", "nowhere", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_configs_of_the_experiment_are_valid():
    from pathlib import Path

    from ngc_jax.commands.compare_entries import entries_of

    for name in ("compare_smollm2", "compare_quick"):
        _, config = cli.parse_arguments(["compare", "--config", f"configs/{name}.yaml"])
        entries = entries_of(config)
        assert len({(entry.variant, entry.recipe.keep) for entry in entries}) == len(entries)
        assert all(isinstance(entry.recipe, Recipe) for entry in entries)
        assert Path(f"configs/{name}.yaml").read_text().startswith("#")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd_llm"},
        {"gauge": False, "rounds": 2, "sensitivities": True, "shrinkage": 0.25, "propagation": 0.3, "keep": 0.55},
        {"gradients": "diagonal", "rank_multiple": 8, "topology": "qkv-o-ug-d", "allocation": "loss"},
        {"kernel": "lifted", "lift": 96, "fit_steps": 7, "rank": 5},
    ],
)
def test_a_process_of_its_own_is_told_the_whole_recipe(options):
    recipe = Recipe(**options)
    _, config = cli.parse_arguments(["convert", "model", *flags_of(recipe)])
    assert recipe_of(config) == recipe
