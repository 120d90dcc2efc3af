"""Tasks without a model: what they ask, and how they score given responses."""

import json
from decimal import Decimal

import pytest
import scipy.stats

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.exact_match import ExactMatch, last_number, strict_number
from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.run_tasks import task_of
from ngc_jax.evaluation.tasks import TaskSpec, read_documents, read_task, task_names, wilson_interval
from tests.tiny import tiny_tokenizer

QUESTIONS = [
    {"question": "Sky?", "choices": ["blue", "as green as grass"], "label": 0},
    {"question": "Grass?", "choices": ["red", "a very deep green"], "label": "B"},
    {"question": "Snow?", "choices": ["white", "black", "grey"], "label": 0},
]
CHOICE = TaskSpec("colours", "Q: {{ question }}\nA:", "multiple_choice")


def test_choices_share_their_context_and_are_scored_by_likelihood_and_per_byte():
    tokenizer = tiny_tokenizer()
    asked = []

    def predict(requests):
        asked.extend(requests)
        given = {"0/0": -2.0, "0/1": -9.0, "1/0": -4.0, "1/1": -6.0, "2/0": -3.0, "2/1": -2.0, "2/2": -5.0}
        return {request.id: {"log_likelihood": given[request.id]} for request in requests}

    scores = MultipleChoice(CHOICE).measure(QUESTIONS, tokenizer, predict, "auto")
    # Per byte: document 0 has -2/4 and -9/17, document 1 -4/3 and -6/17, document 2 -3/5, -2/5 and -5/4.
    assert scores["acc"].values == (1.0, 0.0, 0.0)
    assert scores["acc_norm"].values == (1.0, 1.0, 0.0)
    assert scores["acc_norm"].mean == pytest.approx(2 / 3)
    assert tokenizer.decode(asked[3].context) == "Q: Grass?\nA:"
    assert tokenizer.decode(asked[3].continuation) == " a very deep green"
    assert asked[0].context.tolist() == asked[1].context.tolist()


def test_solved_examples_precede_every_prompt_and_are_not_scored():
    spec = TaskSpec("colours", "Q: {{ question }}\nA:", "multiple_choice", shots=1)
    ((number, requests), _) = MultipleChoice(spec).prepare(QUESTIONS, tiny_tokenizer(), "auto")
    assert number == 1
    assert tiny_tokenizer().decode(requests[0].context) == "Q: Sky?\nA: blue\n\nQ: Grass?\nA:"
    with pytest.raises(UsageError, match="leave none to score"):
        MultipleChoice(spec).prepare(QUESTIONS[:1], tiny_tokenizer(), "auto")


def test_spaces_at_the_end_of_a_prompt_belong_to_what_follows():
    spec = TaskSpec("colours", "{{ question }} It is ", "multiple_choice", delimiter="")
    _, requests = MultipleChoice(spec).prepare(QUESTIONS, tiny_tokenizer(), "auto")[0]
    assert tiny_tokenizer().decode(requests[0].context) == "Sky? It is"
    assert tiny_tokenizer().decode(requests[0].continuation) == " blue"


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("Half of 48 is 24.\n#### 72", "72", "72"),
        ("#### $1,234.50 and then 7", "1234.50", "7"),
        ("So she pays 18.00 dollars.", None, "18.00"),
        ("It falls by 3 to -4.", None, "-4"),
        ("#### -12", "-12", "-12"),
        ("no number at all", None, None),
        ("####", None, None),
        ("costs $5.", None, "5"),
        ("1,000,000", None, "1000000"),
    ],
)
def test_numbers_of_answers(text, strict, last):
    assert strict_number(text) == (None if strict is None else Decimal(strict))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_answers_are_compared_as_numbers_or_as_texts():
    documents = [{"question": str(n), "answer": f"It is so.\n#### {n},000"} for n in (1, 2, 3)]
    texts = {"0": "... #### 1000.0", "1": "it must be 2000", "2": "#### 4 or 3000"}

    def predict(requests):
        return {request.id: {"text": texts[request.id]} for request in requests}

    spec = TaskSpec("sums", "{{ question }}", "exact_match", answer="number")
    scores = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto")
    assert scores["strict"].values == (1.0, 0.0, 0.0)
    assert scores["flexible"].values == (1.0, 1.0, 1.0)
    spec = TaskSpec("words", "{{ question }}", "exact_match", target="{{ word }}")
    words = [{"question": "a", "word": "... #### 1000.0 "}, {"question": "b", "word": "It must be 2000"}]
    assert ExactMatch(spec).measure(words, tiny_tokenizer(), predict, "auto")["exact_match"].values == (1.0, 0.0)


def test_intervals_are_wilsons():
    for successes, count in ((0, 5), (5, 5), (81, 263), (1, 2)):
        expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, "wilson")
        assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_tasks_are_read_from_yaml(tmp_path):
    assert set(task_names()) == {"arc_easy", "gsm8k", "openbookqa"}
    assert read_task("gsm8k").score_names == ("strict", "flexible")
    (tmp_path / "own.yaml").write_text(
        'name: own\nsource: own.jsonl\ntemplate: "{{ input }}"\nmetric: exact_match\n'
        'target: "{{ target }}"\nuntil: ["\\n"]\n'
    )
    spec = read_task(str(tmp_path / "own.yaml"))
    assert (spec.name, spec.until, spec.source) == ("own", ("\n",), str(tmp_path / "own.jsonl"))
    assert isinstance(task_of(spec), ExactMatch)
    assert isinstance(task_of(read_task("arc_easy")), MultipleChoice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ntemplate: b\n", "a task has name, template and metric"),
        ("name: a\ntemplate: b\nmetric: bleu\n", "expected multiple_choice or exact_match"),
        ("name: a\ntemplate: b\nmetric: exact_match\nshot: 3\n", "did you mean shots"),
        ("name: a\ntemplate: b\nmetric: exact_match\nshots: -1\n", "whole number from 0"),
        ("name: a\ntemplate: b\nmetric: exact_match\nuntil: x\n", "expected a list of texts"),
        ("name: [\n", "is not YAML"),
        ("name: 3\ntemplate: b\nmetric: exact_match\n", "expected a text"),
    ],
)
def test_wrong_tasks_are_refused(text, message, tmp_path):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_task(str(tmp_path / "task.yaml"))


def test_wrong_names_documents_and_fields_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean gsm8k"):
        read_task("gsm8")
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    assert read_documents(str(file)) == QUESTIONS
    file.write_text(json.dumps(QUESTIONS))
    assert read_documents(str(file)) == QUESTIONS
    for text, message in (('{"a": 1}\n{"a"', "line 2"), ("3\n", "entry 1"), ("\n", "no documents")):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_documents(str(file))
    for document, message in (
        ({"question": "x", "choices": ["a", "b"], "label": 2}, "index of one of its 2 choices"),
        ({"question": "x", "choices": "ab", "label": 0}, "a list of two texts"),
        ({"choices": ["a", "b"], "label": 0}, "'question' is undefined"),
    ):
        with pytest.raises(UsageError, match=message):
            MultipleChoice(CHOICE).prepare([document], tiny_tokenizer(), "auto")
