import re

import numpy as np
import pytest

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
