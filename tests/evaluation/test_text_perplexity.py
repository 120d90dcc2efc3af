"""Perplexity of documents: the numbers of the perplexity of a text, and an interval with the right coverage."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.pairs import compare_runs, read_run
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.evaluation.run_tasks import RunOptions, run_task
from ngc_jax.evaluation.scores import UnitPerplexity
from ngc_jax.evaluation.specs import PerplexitySpec
from ngc_jax.models.save import save_model
from ngc_jax.models.tokenizer import wrap
from tests.tiny import tiny_model, tiny_tokenizer

SPEC = PerplexitySpec("texts", "{{ text }}", window=12)
TEXTS = ["Groups of neurons exchange signals.", "Short", "A text without an end, as it seems"]
DOCUMENTS = [{"text": text} for text in TEXTS]


def tokenizer_with_bos():
    backend = tiny_tokenizer()._backend
    return wrap(backend, special_tokens={"bos_token": "<user>", "eos_token": "<eos>"}, add_bos=True)


@pytest.mark.parametrize("make", [tiny_tokenizer, tokenizer_with_bos])
def test_each_document_has_the_perplexity_of_its_text(make, tmp_path):
    model = dataclasses.replace(tiny_model(), load_tokenizer=make)
    found = run_task(model, SPEC, DOCUMENTS, tmp_path, how=RunOptions(2))
    tokens, octets = found.scores["token_perplexity"], found.scores["byte_perplexity"]
    for number, text in enumerate(TEXTS):
        alone = measure_perplexity(model, text, tokenizer=make(), window=12)
        assert tokens.units[number] == alone.tokens
        assert tokens.values[number] == pytest.approx(alone.tokens * math.log(alone.perplexity), rel=1e-5)
        assert octets.values[number] / math.log(2) / octets.units[number] == pytest.approx(
            alone.bits_per_byte, rel=1e-5
        )
    assert tokens.mean == pytest.approx(math.exp(sum(tokens.values) / sum(tokens.units)))
    assert found.scores["word_perplexity"].units[1] == 1
    again = run_task(model, SPEC, DOCUMENTS, tmp_path, how=RunOptions(2))
    assert again.reused == sum(len(range(0, len(text), 12 - (make is tokenizer_with_bos))) for text in TEXTS)
    assert read_run(tmp_path).scores == again.scores
    with pytest.raises(UsageError, match="no score in common"):
        compare_runs(tmp_path, tmp_path)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of documents whose tokens have a known mean; 95 % of 400 intervals, with three standard errors."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        units = random.integers(20, 200, 60)
        nats = [float(random.gamma(2.0, 1.0, count).sum()) for count in units]
        low, high = UnitPerplexity(tuple(nats), tuple(map(int, units))).interval
        covered += low < math.exp(2.0) < high
    assert abs(covered / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no solved examples"):
        PerplexitySpec("texts", "{{ text }}", shots=1)
    with pytest.raises(UsageError, match="window of task texts is 1"):
        PerplexitySpec("texts", "{{ text }}", window=1)
    with pytest.raises(UsageError, match="document 1 has no token to score"):
        run_task(tiny_model(), SPEC, [DOCUMENTS[0], {"text": "x"}], tmp_path)
    assert UnitPerplexity((3.0,), (2,)).interval == (1.0, math.inf)


def test_the_command_prints_perplexities(tmp_path, capsys):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "texts.yaml").write_text(
        'name: texts\nsource: texts.jsonl\ntemplate: "{{ text }}"\nmetric: perplexity\nwindow: 12\n'
    )
    line = ["evaluate", str(tmp_path / "model"), "--task", str(tmp_path / "texts.yaml"), "--out", str(tmp_path / "run")]
    assert cli.main([*line, "--json", str(tmp_path / "summary.json")]) == 0
    printed = capsys.readouterr().out
    score = json.loads((tmp_path / "summary.json").read_text())["scores"]["byte_perplexity"]
    assert f"{score['mean']:,.3f}" in printed
    assert "%" not in printed.split("byte_perplexity")[1]
    assert cli.main([*line, "--against", str(tmp_path / "other")]) == 2
    assert "not compared" in capsys.readouterr().err
