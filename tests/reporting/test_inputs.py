"""Directories are known by what is in them."""

import json

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.save import save_model
from ngc_jax.reporting.inputs import read_inputs
from tests.models.compact import compact_model
from tests.reporting.setting import comparison, metrics, stability


def put(directory, name, content):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(compact_model(), tmp_path_factory.mktemp("inputs") / "tiny")


def test_every_kind_is_recognised(model, tmp_path):
    lines = "\n".join(map(json.dumps, metrics()))
    sources = [
        str(model),
        put(tmp_path / "a", "results.json", comparison()),
        put(tmp_path / "b", "stability.json", stability()),
        put(tmp_path / "c", "metrics.jsonl", f"{lines}\n"),
    ]
    found = read_inputs(sources)
    kinds = (found.models, found.comparisons, found.stabilities, found.trainings)
    assert [[one.label for one in kind] for kind in kinds] == [["tiny"], ["a"], ["b"], ["c"]]
    assert found.models[0].data.plan == compact_model().plan
    assert found.trainings[0].data == metrics()


def test_a_finished_run_has_its_model_with_it_once(model, tmp_path):
    run = tmp_path / "run"
    put(run, "metrics.jsonl", json.dumps(metrics()[1]))
    save_model(compact_model(), run / "model")
    found = read_inputs([str(run), str(run / "model"), str(run)])
    assert [one.label for one in found.models] == ["run/model"]
    assert len(found.trainings) == 1


def test_equal_names_are_told_apart_by_their_paths(tmp_path):
    sources = [put(tmp_path / name / "depth", "stability.json", stability()) for name in ("x", "y")]
    assert [one.label for one in read_inputs(sources).stabilities] == sources


def test_what_is_nothing_is_refused_with_what_was_looked_for(tmp_path):
    for source in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UsageError, match=r"config\.json.*results\.json.*stability\.json.*metrics\.jsonl"):
            read_inputs([source])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("stability.json", "{", "is not JSON"),
        ("stability.json", "[]", "does not hold an object"),
        ("stability.json", {"along": "width", "prompts": [1]}, "along depth or sequence"),
        ("stability.json", {}, "no 'along'"),
        ("results.json", {"settings": {}}, "no dense, entries"),
        ("results.json", {"settings": {}, "dense": {}, "entries": 3}, "list of entries"),
        ("metrics.jsonl", "", "no line at all"),
        ("metrics.jsonl", '{"loss": 1}', "without a step"),
        ("metrics.jsonl", '{"step": 1}\n{', "line 2"),
    ],
)
def test_damaged_files_are_named(name, content, told, tmp_path):
    source = put(tmp_path / "damaged", name, content)
    with pytest.raises(UsageError, match=name) as caught:
        read_inputs([source])
    assert told in str(caught.value)
