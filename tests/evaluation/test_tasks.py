"""Tasks without a model: what they ask, and how they score given responses."""

import json
from decimal import Decimal

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.answers import last_number, strict_number
from ngc_jax.evaluation.documents import read_documents
from ngc_jax.evaluation.exact_match import ExactMatch
from ngc_jax.evaluation.multiple_choice import MultipleChoice
from ngc_jax.evaluation.run_tasks import task_of
from ngc_jax.evaluation.specs import GenerationSpec, MultipleChoiceSpec
from ngc_jax.evaluation.tasks import read_task, task_names
from tests.tiny import tiny_tokenizer

QUESTIONS = [
    {"question": "Sky?", "choices": ["blue", "as green as grass"], "label": 0},
    {"question": "Grass?", "choices": ["red", "a very deep green"], "label": "B"},
    {"question": "Snow?", "choices": ["white", "black", "grey"], "label": 0},
]
CHOICE = MultipleChoiceSpec("colours", "Q: {{ question }}\nA:")


def test_choices_share_their_context_and_are_scored_by_likelihood_and_per_byte():
    tokenizer = tiny_tokenizer()
    asked = []

    def predict(requests):
        asked.extend(requests)
        given = {"0/0": -2.0, "0/1": -9.0, "1/0": -4.0, "1/1": -6.0, "2/0": -3.0, "2/1": -2.0, "2/2": -5.0}
        return {request.id: {"log_likelihood": given[request.id]} for request in requests}

    measured = MultipleChoice(CHOICE).measure(QUESTIONS, tokenizer, predict, "auto")
    scores = measured.scores
    assert measured.numbers == (0, 1, 2)
    assert measured.truncated is None
    # Per byte: document 0 has -2/4 and -9/17, document 1 -4/3 and -6/17, document 2 -3/5, -2/5 and -5/4.
    assert scores["acc"].values == (1.0, 0.0, 0.0)
    assert scores["acc_norm"].values == (1.0, 1.0, 0.0)
    assert scores["acc_norm"].mean == pytest.approx(2 / 3)
    assert tokenizer.decode(asked[3].context) == "Q: Grass?\nA:"
    assert tokenizer.decode(asked[3].continuation) == " a very deep green"
    assert asked[0].context.tolist() == asked[1].context.tolist()


def test_solved_examples_precede_every_prompt_and_are_not_scored():
    spec = MultipleChoiceSpec("colours", "Q: {{ question }}\nA:", shots=1)
    ((number, requests), _) = MultipleChoice(spec).prepare(QUESTIONS, tiny_tokenizer(), "auto")
    assert number == 1
    assert tiny_tokenizer().decode(requests[0].context) == "Q: Sky?\nA: blue\n\nQ: Grass?\nA:"
    with pytest.raises(UsageError, match="leave none to score"):
        MultipleChoice(spec).prepare(QUESTIONS[:1], tiny_tokenizer(), "auto")


def test_spaces_at_the_end_of_a_prompt_belong_to_what_follows():
    spec = MultipleChoiceSpec("colours", "{{ question }} It is ", delimiter="")
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
        return {request.id: {"text": texts[request.id], "tokens": 3, "finish": "stop"} for request in requests}

    spec = GenerationSpec("sums", "{{ question }}", answer="number")
    scores = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto").scores
    assert scores["strict"].values == (1.0, 0.0, 0.0)
    assert scores["flexible"].values == (1.0, 1.0, 1.0)
    spec = GenerationSpec("last", "{{ question }}", answer="last_number")
    scores = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto").scores
    assert {name: score.values for name, score in scores.items()} == {"last_number": (1.0, 1.0, 1.0)}
    spec = GenerationSpec("words", "{{ question }}", target="{{ word }}")
    words = [{"question": "a", "word": "... #### 1000.0 "}, {"question": "b", "word": "It must be 2000"}]
    measured = ExactMatch(spec).measure(words, tiny_tokenizer(), predict, "auto")
    assert measured.scores["exact_match"].values == (1.0, 0.0)
    spec = GenerationSpec("words", "{{ question }}", target="{{ word }}", answer="number")
    with pytest.raises(UsageError, match="document 0 has no number; use answer: text"):
        ExactMatch(spec).measure([{"question": "a", "word": "b"}], tiny_tokenizer(), predict, "auto")


def test_tasks_are_read_from_yaml(tmp_path):
    assert set(task_names()) == {"arc_easy", "gsm8k", "math500", "mawps", "openbookqa"}
    assert all(read_task(name).source.startswith("hub:") for name in task_names())
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
        ("name: a\ntemplate: b\nmetric: [x]\n", "expected multiple_choice or exact_match"),
        ("name: a\ntemplate: b\nmetric: exact_match\nfields: [x]\n", "mapping of names to Jinja expressions"),
        ("name: a\ntemplate: b\nmetric: exact_match\nchat: 1\n", "expected true or false"),
        ("name: a\ntemplate: b\nmetric: exact_match\nsystem: Be brief.\n", "which only chats have"),
        ("name: a\ntemplate: b\nmetric: exact_match\nsamples: 4\n", "at temperature 0 are all the same"),
        ("name: a\ntemplate: b\nmetric: exact_match\nsamples: 4\ntemperature: x\n", "expected a number"),
        ("name: a\ntemplate: b\nmetric: exact_match\ntemperature: -1\n", "temperature is -1"),
        ("name: a\ntemplate: b\nmetric: exact_match\nsamples: 2\ntemperature: 1\npass_at: [4]\n", "from 1 to .* 2"),
        ("name: a\ntemplate: b\nmetric: exact_match\nanswer: maths\n", "text or number or last_number or math"),
        ("name: a\ntemplate: b\nmetric: exact_match\nthink_end: ''\n", "the tag that ends the reasoning"),
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


def test_entries_of_the_other_metric_have_no_effect(tmp_path):
    (tmp_path / "task.yaml").write_text("name: a\ntemplate: b\nmetric: multiple_choice\nuntil: [x]\ntarget: y\n")
    assert read_task(str(tmp_path / "task.yaml")) == MultipleChoiceSpec("a", "b")


CHAT = GenerationSpec("chat", "Q: {{ question }}", target="{{ a }}", shots=1, chat=True, max_new_tokens=5)
PAIRS = [{"question": "1+1", "a": "2"}, {"question": "2+3", "a": "5"}]


def test_a_chat_has_examples_as_turns_and_ends_where_the_answer_begins():
    tokenizer = tiny_tokenizer()
    ((request,),) = ExactMatch(CHAT).prepare(PAIRS, tokenizer, "auto")
    # The template writes <user> before every message, whoever's it is.
    assert tokenizer.decode(request.prompt) == "<user>Q: 1+1<user>2<user>Q: 2+3<assistant>"
    spec = GenerationSpec("chat", "{{ question }}", target="{{ a }}", chat=True, system="Be brief.")
    ((request,), _) = ExactMatch(spec).prepare(PAIRS, tokenizer, "auto")
    assert tokenizer.decode(request.prompt) == "<user>Be brief.<user>1+1<assistant>"
    assert "<user>" not in tokenizer.decode(request.prompt, skip_special_tokens=True)  # encoded as special tokens


def test_choices_of_a_chat_follow_the_template_without_a_delimiter():
    spec = MultipleChoiceSpec("colours", "Q: {{ question }}", shots=1, chat=True)
    ((_, (one, two)), _) = MultipleChoice(spec).prepare(QUESTIONS, tiny_tokenizer(), "auto")
    decode = tiny_tokenizer().decode
    assert decode(one.context) == decode(two.context) == "<user>Q: Sky?<user>blue<user>Q: Grass?<assistant>"
    assert (decode(one.continuation), decode(two.continuation)) == ("red", "a very deep green")


def test_a_solved_example_may_show_more_than_the_target():
    spec = GenerationSpec(
        "sums", "{{ question }}", target="{{ a }}", solution="It is {{ a }}", delimiter=" -> ", shots=1
    )
    ((request,),) = ExactMatch(spec).prepare(PAIRS, tiny_tokenizer(), "auto")
    assert tiny_tokenizer().decode(request.prompt) == "1+1 -> It is 2\n\n2+3"
    assert request.about["target"] == "5"


def generate(texts):
    """A predict function with these texts, all cut at the longest answer that do not end in a dot."""

    def predict(requests):
        return {
            request.id: {"text": text, "tokens": len(text), "finish": "stop" if text.endswith(".") else "length"}
            for request, text in zip(requests, texts, strict=True)
        }

    return predict


def test_only_what_follows_the_reasoning_is_judged():
    documents = [{"question": str(n), "answer": "#### 7"} for n in range(6)]
    spec = GenerationSpec("sums", "{{ question }}", answer="number", think_end="</think>", until=("\n\n",))
    texts = [
        "<think>3?\n\n#### 3</think>#### 7.",
        "<think>#### 7\n\n",  # cut while it reasons
        "<think>#### 7.",  # ends while it reasons: there is no answer
        "a</think>5</think>#### 7\n\n#### 8",  # the last tag counts, and what follows the end of the answer does not
        "</think>#### 7 or",  # cut, but it has an answer
        "</think>#### 8.",
    ]
    asked = []

    def predict(requests):
        asked.extend(requests)
        return generate(texts)(requests)

    measured = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto")
    assert measured.scores["strict"].values == (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    assert measured.truncated.values == (0.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    assert {(request.until, request.special_tokens) for request in asked} == {((), False)}
    # A tag that is a special token, as <eos> here, would be lost in decoding.
    spec = GenerationSpec("sums", "{{ question }}", think_end="<eos>")
    assert ExactMatch(spec).prepare(documents, tiny_tokenizer(), "auto")[0][0].special_tokens


def test_samples_have_seeds_of_their_own_and_are_scored_by_pass_at_k():
    spec = GenerationSpec(
        "sums", "{{ question }}", target="{{ a }}", samples=3, temperature=0.5, top_p=0.9, seed=4, pass_at=(2, 1)
    )
    asked = []

    def predict(requests):
        asked.extend(requests)
        return generate(["2.", "2", "3.", "5", "6", "7"])(requests)

    documents = [{**document, "a": document["a"] + "."} for document in PAIRS]
    measured = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto")
    assert [request.id for request in asked] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [request.seed for request in asked] == [(4, 0), (4, 1), (4, 2), (4, 1024), (4, 1025), (4, 1026)]
    assert {(request.temperature, request.top_p) for request in asked} == {(0.5, 0.9)}
    # One of three samples of the first document is right: two of the three pairs of them have it.
    assert {name: score.values for name, score in measured.scores.items()} == {
        "exact_match_pass@1": (pytest.approx(1 / 3), 0.0),
        "exact_match_pass@2": (pytest.approx(2 / 3), 0.0),
    }
    assert measured.truncated.values == pytest.approx((1 / 3, 1.0))
    assert measured.tokens == (pytest.approx(5 / 3), 1.0)
    low, high = measured.scores["exact_match_pass@2"].interval
    assert 0 <= low < 1 / 3 < high <= 1


def test_fields_are_computed_from_those_of_a_document():
    spec = MultipleChoiceSpec(
        "own", "{{ ask }}", fields={"ask": "question ~ '!'", "choices": "options.all", "label": "right | int - 1"}
    )
    document = {"question": "Sky?", "options": {"all": ["red", "blue"]}, "right": "2"}
    ((_, requests),) = MultipleChoice(spec).prepare([document], tiny_tokenizer(), "auto")
    assert tiny_tokenizer().decode(requests[0].context) == "Sky?!"
    assert [request.about["text"] for request in requests] == ["red", "blue"]
    for fields, message in (
        ({"label": "wrong"}, "the field label, 'wrong', cannot be filled from document 0 .*; it has question"),
        ({"label": "right +"}, "cannot be filled"),
        ({"label": "right.__class__.__mro__"}, "cannot be filled|unsafe"),
    ):
        with pytest.raises(UsageError, match=message):
            MultipleChoice(MultipleChoiceSpec("own", "{{ question }}", fields=fields)).prepare(
                [document], tiny_tokenizer(), "auto"
            )
