"""A model's own right answers, on a tiny model and on made responses."""

import dataclasses
import json

import pytest

from experiments import worked_answers
from ngc_jax.conversion.mixtures import mix_tokens, sources_of
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.specs import GenerationSpec
from ngc_jax.models.save import save_model
from ngc_jax.training.data import DataConfig, make_pipeline
from tests.tiny import tiny_model, tiny_tokenizer

SPEC = GenerationSpec("sums", "{{ question }} =", target="{{ sum }}", answer="number", samples=4, temperature=1.0)
DOCUMENTS = [{"question": "2 + 2", "sum": "4"}, {"question": "1 + 4", "sum": "5"}]


def response(document, sample, text, finish="stop"):
    return {"document": document, "sample": sample, "text": text, "finish": finish, "target": "45"[document]}


def test_right_answers_are_written_once_and_in_order():
    responses = [
        response(1, 0, "1 and 4 is 5"),
        response(0, 3, "Four: 4"),
        response(0, 0, "It is 5"),  # wrong
        response(0, 1, " 2 + 2 = 4\n"),
        response(0, 2, "2 + 2 = 4"),  # the same
        response(1, 1, "5", finish="length"),  # cut
        response(1, 2, "#### 5"),
        response(1, 3, "five, 5"),  # more than are wanted
    ]
    rows = worked_answers.right_answers(SPEC, DOCUMENTS, responses, most=2)
    assert [(row["document"], row["sample"], row["response"]) for row in rows] == [
        (0, 1, "2 + 2 = 4"),
        (0, 3, "Four: 4"),
        (1, 0, "1 and 4 is 5"),
        (1, 2, "#### 5"),
    ]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": "2 + 2 = 4"},
    ]


def test_reasoning_is_written_and_what_follows_it_is_judged():
    spec = dataclasses.replace(SPEC, think_end="</think>", chat=True, system="Think.")
    responses = [response(0, 0, "<think>5?</think>4"), response(0, 1, "<think>4</think>5"), response(0, 2, "<think>4")]
    (row,) = worked_answers.right_answers(spec, DOCUMENTS, responses, most=9)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["response"] == "<think>5?</think>4"


def test_wrong_options_are_refused(tmp_path):
    model = str(save_model(tiny_model(), tmp_path / "dense"))
    (tmp_path / "p.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n')
    for flags, message in (
        (["--task", "arc_easy"], "are given, not generated"),
        (["--task", f"gsm8k={tmp_path / 'p.jsonl'}", "--skip", "1"], "--skip 1 leaves none"),
        (["--samples", "0"], "--samples is 0"),
        (["--skip", "-1"], "--skip is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            worked_answers.main([model, *flags, "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_answers_of_a_model_are_texts_for_calibration_and_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tmp_path / "dense")
    # A random model says such a digit last sometimes.
    (tmp_path / "sums.yaml").write_text(
        "name: sums\nsource: sums.jsonl\ntemplate: '{{ question }} ='\nmetric: exact_match\ntarget: '{{ sum }}'\n"
        "answer: last_number\nmax_new_tokens: 40\n"
    )
    digits = [{"question": f"{n} + 0", "sum": str(n)} for n in range(1, 9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in digits))
    flags = ["dense", "--task", "sums.yaml", "--samples", "8", "--temperature", "2", "--out", "out", "--most", "3"]
    worked_answers.main(flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert results["rows"] == len(rows)
    assert results["documents"] == 8
    worked_answers.main(flags)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["reused"] == 64
    if not rows:  # so that what follows is tested whatever a random model says
        made = [response(0, n, f"so it is 4, {n} 4") for n in range(9)]
        rows = worked_answers.right_answers(SPEC, DOCUMENTS, made, most=9)
        (tmp_path / "out" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = mix_tokens(sources_of("out/answers.jsonl:1"), tiny_tokenizer(), None, window=8)
    assert mixed.rows == ("messages",)
    source = {"name": "out/answers.jsonl", "prompt_column": "prompt", "column": "response"}
    config = DataConfig(sources=(source,), sequence_length=48, batch_size=1, prompts="chat", prefetch=0)
    batch = next(iter(make_pipeline(config, tiny_tokenizer())))
    assert 0 < batch["weights"].sum() < 48
