"""Documents of files and of datasets, in the forms in which the hub has them."""

import dataclasses
import json
import sys

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.documents import document_key, read_documents
from ngc_jax.evaluation.exact_match import ExactMatch
from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.tasks import read_task
from tests.tiny import tiny_tokenizer

ARC = {
    "id": "a",
    "question": "Sky?",
    "choices": {"text": ["red", "blue", "grey"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
OPENBOOK = {
    "id": "b",
    "question_stem": "The sky is",
    "choices": {"text": ["red", "blue"], "label": ["A", "B"]},
    "answerKey": "B",
}
FLAT = {"question": "Sky?", "choices": ["red", "blue", "grey"], "label": 1}


def right_choice(task, document):
    asked, given = [], {}

    def predict(requests):
        asked.extend(requests)
        return {request.id: {"log_likelihood": given.get(request.about["text"], -9.0)} for request in requests}

    for text in ("red", "blue", "grey"):
        given.clear()
        given[text] = -1.0
        if MultipleChoice(read_task(task)).measure([document], tiny_tokenizer(), predict, "auto").scores["acc"].mean:
            return text, tiny_tokenizer().decode(asked[0].context)
    return None


def test_choices_of_the_hub_and_of_flat_files_are_the_same():
    assert right_choice("arc_easy", ARC) == right_choice("arc_easy", FLAT) == ("blue", "Question: Sky?\nAnswer:")
    lettered = {**ARC, "choices": {**ARC["choices"], "label": ["A", "B", "C"]}, "answerKey": "B"}
    assert right_choice("arc_easy", lettered) == ("blue", "Question: Sky?\nAnswer:")
    assert right_choice("openbookqa", OPENBOOK) == ("blue", "The sky is")
    assert right_choice("openbookqa", {**FLAT, "question": "The sky is"}) == ("blue", "The sky is")
    with pytest.raises(UsageError, match="its letter, or its name"):
        right_choice("arc_easy", {**ARC, "answerKey": "7"})
    with pytest.raises(UsageError, match="the field label"):
        right_choice("arc_easy", {"question": "Sky?", "choices": ["red", "blue"]})


@pytest.mark.parametrize(
    "document", [{"input": "3 and 4?", "target": 7.0}, {"question": "3 and 4?", "result_float": 7.0, "result": "7"}]
)
def test_word_problems_have_whole_targets_where_they_are_whole(document):
    ((request,),) = ExactMatch(read_task("mawps")).prepare([document] * 5, tiny_tokenizer(), "auto")
    text = tiny_tokenizer().decode(request.prompt)
    assert text == "Question: 3 and 4?\nAnswer: 7\n\n" * 4 + "Question: 3 and 4?\nAnswer:"
    assert request.about["target"] == "7"
    half = {"input": "Half of 5?", "target": 2.5}
    ((request,),) = ExactMatch(read_task("mawps")).prepare([document] * 4 + [half], tiny_tokenizer(), "auto")
    assert request.about["target"] == "2.5"


def test_a_solved_problem_shows_its_solution_or_else_its_answer_in_a_box():
    spec = dataclasses.replace(read_task("math500"), shots=2)
    documents = [
        {"problem": "a", "answer": "\\frac{1}{2}"},
        {"problem": "b", "answer": "2", "solution": "Two: $\\boxed{2}$"},
        {"problem": "c", "answer": "3"},
    ]
    ((request,),) = ExactMatch(spec).prepare(documents, tiny_tokenizer(), "auto")
    text = tiny_tokenizer().decode(request.prompt)
    assert "within \\boxed{}.\n\n\\boxed{\\frac{1}{2}}\n\n" in text
    assert "\nTwo: $\\boxed{2}$\n\nc\n\n" in text


def test_a_dataset_is_read_with_its_configuration_and_split(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps(ARC) + "\n" + json.dumps({**ARC, "id": "c"}) + "\n")
    documents = read_documents(f"hub:{folder}")
    assert documents == [ARC, {**ARC, "id": "c"}]
    assert right_choice("arc_easy", documents[0])[0] == "blue"
    with pytest.raises(UsageError, match=r"cannot be loaded .*check its name and the network"):
        read_documents(f"hub:{folder}::validation")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [ARC])
    assert read_documents(read_task("gsm8k").source) == [ARC]
    assert read_documents("hub:org/name") == [ARC]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("org/name", None), {"split": "test"})]


def test_datasets_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="names no dataset"):
        read_documents("hub:a:b:c:d")
    with pytest.raises(UsageError, match="check its name and the network, or give a file"):
        read_documents("hub:openai/gsm8k:main:test")  # tests are offline
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"hub:org/name needs datasets, which is not installed; pip install"):
        read_documents("hub:org/name")


def test_the_key_of_a_document_is_its_content():
    assert document_key({"a": 1, "b": [2]}) == document_key({"b": [2], "a": 1}) != document_key({"a": 1, "b": [3]})
