import dataclasses
import math
import re

import numpy as np
import pytest

from experiments.reasoner import run
from experiments.reasoner.problems import ALPHABET, ProblemBatches, encode, make_problem, make_rows, make_tokenizer


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_step_of_the_working_is_right(steps):
    for seed in range(50):
        problem = make_problem(np.random.default_rng(seed), steps)
        chain = problem.prompt.removesuffix("=")
        assert eval(re.sub(r"\b0(\d)", r"\1", chain)) % 100 == problem.answer
        *lines, last = problem.working.split(";")
        assert last == f"#{problem.answer}\n"
        assert len(lines) == steps
        for line in lines:
            left, right = line.split("=")
            assert eval(left) % 100 == int(right)


def test_the_tokenizer_is_the_encoding():
    text = make_problem(np.random.default_rng(0), 3)
    line = text.prompt + text.working
    tokenizer = make_tokenizer()
    np.testing.assert_array_equal(tokenizer.encode(line), encode(line))
    assert tokenizer.decode(encode(line)) == line
    assert tokenizer.vocab_size == len(ALPHABET)


def test_only_working_and_answers_count():
    tokens, weights = make_rows(np.random.default_rng(1), 3, 60, 2)
    for row, weight in zip(tokens, weights, strict=True):
        text = "".join(ALPHABET[token] for token in row)
        first = text.index("=") + 1
        assert not weight[:first].any()
        assert weight[first : text.index("\n") + 1].all()
        assert not weight[text.index("\n") + 1]


def test_batches_go_on_where_they_were():
    batches, again = (ProblemBatches(3, rows=2, length=20, steps=2) for _ in range(2))
    next(batches)
    again.set_state(batches.get_state())
    np.testing.assert_array_equal(next(batches)["tokens"], next(again)["tokens"])


def test_accuracy_has_wilsons_interval_and_perplexities_a_geometric_mean():
    where = {"method": "ngc", "keep": 0.5, "stage": "one-shot", "stored": 10}
    rows = [
        {**where, "seed": 0, "right": 10, "problems": 50, "perplexity": 2.0},
        {**where, "seed": 1, "right": 30, "problems": 50, "perplexity": 8.0},
    ]
    (found,) = run.summarise(rows)
    z, p, n = 1.959964, 0.4, 100
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(
        [found["low"], found["high"]], [(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)], rtol=1e-5
    )
    assert found["accuracy"] == p
    assert found["by_seed"] == [0.2, 0.6]
    assert found["perplexity"] == pytest.approx(4)


@pytest.mark.slow
def test_a_small_run_is_done_once_reported_and_drawn(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        run.QUICK, width=24, layers=1, chain=1, steps=3, distil_steps=2, rows=4, length=32, problems=6,
        calibration_rows=8,
    )  # fmt: skip
    monkeypatch.setattr(run, "METHODS", ("svd", "ngc"))
    monkeypatch.setattr(run, "KEEPS", (0.8,))
    rows = run.run_seed(settings, 0, tmp_path / "seed")
    assert [(row["method"], row["stage"]) for row in rows] == [
        ("dense", "as trained"),
        *((method, stage) for method in ("svd", "ngc") for stage in ("one-shot", "distilled")),
    ]
    assert all(0 < row["stored"] <= 0.8 * rows[0]["stored"] for row in rows[1:])
    for step in ("convert", "fit", "evaluate"):
        monkeypatch.setattr(run, step, None)
    assert run.run_seed(settings, 0, tmp_path / "seed") == rows
    summary = run.summarise(rows)
    table = run.markdown(summary)
    assert table.count("\n") == 4 + 2
    run.draw(summary, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
