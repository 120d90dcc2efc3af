"""The arena: its numbers by hand, and a whole one on a tiny model that is interrupted."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import bootstrap

from experiments.arena import __main__ as arena
from experiments.arena import cells, results
from experiments.arena.retained import Scores, chance_of, retained
from experiments.arena.settings import read_problem
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.responses import Responses
from ngc_jax.evaluation.run_tasks import run_task
from ngc_jax.evaluation.specs import GenerationSpec, MultipleChoiceSpec
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model, tiny_tokenizer

SENTENCE = "Groups of neurons exchange signals; a weight is what two states make of each other.\n"


def test_the_retained_share_is_that_computed_by_hand():
    # 15 of 30 against 24 of 30; chance is 1/4 for 20 documents and 1/2 for 10, together 10 of 30.
    values, dense = (1.0,) * 15 + (0.0,) * 15, (1.0,) * 24 + (0.0,) * 6
    scores = Scores(values, dense, (0.25,) * 20 + (0.5,) * 10)
    found = retained([scores])
    assert found.share == pytest.approx((15 - 10) / (24 - 10))

    def ratio(model, other, axis):
        return model.sum(axis) / other.sum(axis)

    above = [np.array(one) - np.array(scores.chance) for one in (values, dense)]
    independent = bootstrap(above, ratio, paired=True, method="percentile", n_resamples=20_000, rng=1)
    interval = independent.confidence_interval
    assert found.interval == pytest.approx((interval.low, interval.high), abs=0.03)


def test_the_same_answers_retain_everything_and_means_are_over_tasks():
    dense = (1.0,) * 30 + (0.0,) * 10
    same, none = Scores(dense, dense, (0.25,) * 40), Scores((0.0,) * 40, dense, (0.0,) * 40)
    assert (retained([same]).share, retained([same]).interval) == (1.0, (1.0, 1.0))
    assert (retained([none]).share, retained([none]).interval) == (0.0, (0.0, 0.0))
    assert retained([same, none]).share == 0.5
    worse = Scores((1.0,) * 5 + (0.0,) * 35, dense, (0.25,) * 40)
    assert retained([worse]).share == pytest.approx((5 - 10) / (30 - 10))  # below chance


def test_no_share_where_the_dense_model_may_be_guessing():
    guessing = Scores((1.0,) * 40, (1.0,) * 13 + (0.0,) * 27, (0.25,) * 40)
    assert not guessing.comparable
    assert retained([guessing]) is None
    known = Scores((1.0,) * 40, (1.0,) * 40, (0.25,) * 40)
    assert retained([guessing, known]).share == 1.0


def test_chance_is_that_of_each_document():
    spec = MultipleChoiceSpec("colours", "{{ question }}", shots=1)
    documents = [{"question": "?", "choices": list("abcde")[:count], "label": 0} for count in (2, 4, 5, 2)]
    assert chance_of(spec, documents, tiny_tokenizer()) == (0.25, 0.2, 0.5)
    assert chance_of(GenerationSpec("sums", "{{ question }}", shots=2), documents, tiny_tokenizer()) == (0, 0)


def made_rows():
    def row(method, keep, right, perplexity, **task):
        values = [1.0] * right + [0.0] * (40 - right)
        shown = {"shown": "acc", "documents": 40, "values": {"acc": values}, "chance": [0.25] * 40}
        about = {"parameters": 1_000_000, "dense_parameters": 1_200_000, "keep_ratio": keep}
        return {
            "model": "tiny",
            "method": method,
            "keep": keep,
            **about,
            "perplexity": {"a/text.txt": {"perplexity": perplexity, "bits_per_byte": 1.5, "tokens": 99}},
            "tasks": {"colours": shown},
        }

    return results.compare_with_dense([row("dense", 1.0, 30, 10.0), row("ngc", 0.8, 26, 12.0)])


def test_the_table_has_scores_shares_and_p_values():
    dense, ngc = made_rows()
    assert dense["retained"] is None
    assert ngc["tasks"]["colours"]["retained"]["share"] == pytest.approx(16 / 20)
    # Worse on 4 documents, better on none: 2 * (1/2)^4.
    assert ngc["tasks"]["colours"]["against_dense"]["p_value"] == pytest.approx(0.125)
    lines = results.markdown([dense, ngc], {"tiny": ["svd at 0.1: left out"]}).splitlines()
    assert lines[2].split(" | ")[3:6] == ["perplexity, text.txt", "colours acc, %", "colours retained, %"]
    # Wilson's interval of 26 of 40 is 49.5 to 77.9 %.
    cells_of = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert cells_of[:5] == ["ngc", "0.8", "1,000,000", "12.000", "65.0 (49.5 to 77.9)"]
    assert cells_of[5].startswith("80.0 (")
    assert cells_of[5].endswith("), p 0.12")
    assert "- svd at 0.1: left out" in lines
    flat = results.flat(ngc)
    assert (flat["colours acc"], flat["colours p"], flat["retained"]) == (0.65, 0.125, pytest.approx(0.8))


def test_the_picture_has_a_line_for_each_method():
    chart = results.picture(made_rows(), "tiny")
    assert [(one.name, one.x, one.y) for one in chart.series] == [("ngc", (0.8,), (pytest.approx(80.0),))]
    assert results.picture(made_rows()[:1], "tiny") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "no method 'best'"),
        (["--methods", "svd_llm, form dense"], "form dense"),
        (["--task", "colours"], "no task 'colours'"),
        (["--task", "arc_easy=missing.jsonl"], "cannot be read"),
        (["--score", "gsm8k=flexible"], "no task of --task"),
        (["--limit", "0"], "--limit is 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        arena.main(["--out", str(tmp_path / "out"), *arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, a task that its dense form solves, and one that it fails."""
    place = tmp_path_factory.mktemp("arena")
    model = load_model(str(save_model(tiny_model(), place / "dense")))
    (place / "text.txt").write_text(SENTENCE * 30)
    (place / "sums.yaml").write_text(
        "name: sums\nsource: sums.jsonl\ntemplate: '{{ question }} ='\nmetric: exact_match\ntarget: '{{ sum }}'\n"
        "max_new_tokens: 2\n"
    )
    (place / "sums.jsonl").write_text("".join(f'{{"question": "{n} + 1", "sum": "{n + 1}"}}\n' for n in range(12)))
    # The right answers are those of the dense model itself.
    words = SENTENCE.split()
    questions = [
        {"question": " ".join(words[n : n + 3]), "choices": [words[-n], words[n], "xyz"], "label": 0} for n in range(12)
    ]
    spec = read_problem_spec()
    run_task(model, spec, questions, place / "own")
    found = [json.loads(line) for line in (place / "own" / "responses.jsonl").read_text().splitlines()[1:]]
    for number, question in enumerate(questions):
        own = sorted((row for row in found if row["document"] == number), key=lambda row: row["choice"])
        sizes = [len(choice) for choice in question["choices"]]
        per_byte = [row["log_likelihood"] / size for row, size in zip(own, sizes, strict=True)]
        question["label"] = int(np.argmax(per_byte))
    (place / "arc.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return place


def read_problem_spec():
    from ngc_jax.evaluation.tasks import read_task

    return read_task("arc_easy")


def run(place, out, *more):
    arguments = ["--models", str(place / "dense"), "--text", str(place / "text.txt"), "--quick"]
    arguments += ["--evaluation-text", str(place / "text.txt"), "pydoc:second-half", "--batch-size", "4"]
    arguments += ["--task", f"arc_easy={place / 'arc.jsonl'}", str(place / "sums.yaml"), "--out", str(out), *more]
    arena.main(arguments)


def lasting(out):
    """The results without times."""
    data = json.loads((out / "results.json").read_text())
    for row in data["rows"]:
        row.pop("seconds", None)
        for found in row["perplexity"].values():
            found.pop("tokens_per_second")
        for task in row["tasks"].values():
            task.pop("reused")
    return data["rows"], data["notes"]


@pytest.mark.slow
def test_an_interrupted_arena_ends_as_an_undisturbed_one(place, tmp_path, monkeypatch):
    monkeypatch.setitem(arena._QUICK, "methods", ["svd_llm", "ngc, form dense"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(place, whole)
    rows, notes = lasting(whole)
    assert [(row["method"], row["keep"]) for row in rows] == [("dense", 1), ("svd_llm", 0.8), ("ngc, form dense", 0.8)]
    assert all(
        set(row["tasks"]) == ({"arc_easy", "sums"} if row["method"] == "dense" else {"arc_easy"}) for row in rows
    )
    assert "sums: left out, because the dense model's exact_match is 0.0 %, below 10 %" in notes[str(place / "dense")]
    assert rows[0]["tasks"]["arc_easy"]["score"]["mean"] == 1.0
    assert all(0.7 < row["keep_ratio"] <= 0.8 and row["parameters"] < row["dense_parameters"] for row in rows[1:])
    assert all(row["retained"]["share"] < 1 for row in rows[1:])
    assert len({row["perplexity"]["pydoc:second-half"]["perplexity"] for row in rows}) == 3
    with (whole / "results.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == [row["method"] for row in rows]
    assert next(whole.glob("retained-*.png")).stat().st_size > 10_000
    assert not list(whole.glob("cells/*/*/model"))
    assert not list((whole / "statistics").iterdir())

    # Interrupted after a batch of the first conversion's task, and then before the second conversion.
    add, seen = Responses.add, []

    def stop(self, requests, responses):
        add(self, requests, responses)
        seen.append(self._path)
        if "svd_llm" in str(self._path):
            raise KeyboardInterrupt

    monkeypatch.setattr(Responses, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, broken)
    monkeypatch.setattr(Responses, "add", add)
    assert len(list(broken.glob("cells/*/svd_llm*/model/model.safetensors"))) == 1
    convert = cells.convert
    monkeypatch.setattr(cells, "convert", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(place, broken)
    (summary,) = broken.glob("cells/*/svd_llm*/arc_easy*/summary.json")
    assert json.loads(summary.read_text())["reused"] > 0
    monkeypatch.setattr(cells, "convert", convert)
    run(place, broken)
    assert lasting(broken) == (rows, notes)
    # Nothing is run again. A conversion that fails does not stop the others.
    for name in ("run_task", "measure_perplexity"):
        monkeypatch.setattr(cells, name, lambda *_, **__: pytest.fail("a finished part is run again"))
    monkeypatch.setitem(arena._QUICK, "keep", [0.8, 0.7])
    tried = []

    def fail(_, recipe, *__, **___):
        tried.append((recipe.method, recipe.keep))
        raise UsageError("the weights are not finite")

    monkeypatch.setattr(cells, "convert", fail)
    run(place, broken)
    assert tried == [("svd_llm", 0.7), ("ngc", 0.7)]
    again, said = lasting(broken)
    assert again == rows
    assert "ngc, form dense 0.7: failed, the weights are not finite" in said[str(place / "dense")]


def test_limits_count_scored_documents(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"question": "{n}", "answer": "#### {n}"}}\n' for n in range(20)))
    problem = read_problem(f"gsm8k={tmp_path / 'p.jsonl'}", limit=3, least=0.1)
    assert (len(problem.documents), problem.score, problem.least) == (8, "flexible", 0.1)
