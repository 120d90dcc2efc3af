"""Batches hold every request once, and their shapes are few when programs are dear and tight when they are cheap."""

import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.batches import cut_context, likelihood_batches
from ngc_jax.evaluation.requests import LikelihoodRequest
from ngc_jax.models.generate import bucket
from tests.tiny import random_tokens


def questions(count, choices=4, *, prefix=(), seed=0):
    """Requests of lengths as those of multiple choice."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        context = np.append(prefix, random_tokens(int(random.integers(5, 120)), seed=1000 * seed + number)).astype(int)
        for choice in range(choices):
            continuation = random_tokens(int(random.integers(1, 30)), seed=choice)
            made.append(LikelihoodRequest(f"{seed}.{number}/{choice}", context, continuation))
    return made


def check(batches, requests, batch_size, limit):
    assert sorted(r.id for b in batches for r in b.requests) == sorted(r.id for r in requests)
    for batch in batches:
        cut = [cut_context(request, limit) for request in batch.requests]
        before = len(batch.prefix)
        assert len(set(cut)) <= batch.shape.contexts <= batch_size
        assert len(cut) <= batch.shape.rows
        assert all(before < len(context) <= before + batch.shape.length for context in cut)
        assert all(context[:before] == batch.prefix for context in cut)
        assert all(len(request.continuation) <= batch.shape.width for request in batch.requests)


def tokens_read(batches):
    return sum(batch.shape.tokens for batch in batches)


@pytest.mark.parametrize("compiling", [0.0, 500.0, 4000.0, 1e9])
def test_every_request_is_in_one_batch_that_has_room_for_it(compiling):
    requests = questions(37) + questions(5, choices=1, seed=1) + questions(2, choices=50, seed=2)
    check(list(likelihood_batches(requests, 3, 100, compiling=compiling)), requests, 3, 100)


def test_shapes_are_merged_while_padding_costs_less_than_programs():
    requests = questions(60)

    def total(planned, compiling):
        batches = list(likelihood_batches(requests, 4, 512, compiling=planned))
        return tokens_read(batches) + compiling * len({batch.shape for batch in batches})

    def shapes(compiling):
        return len({batch.shape for batch in likelihood_batches(requests, 4, 512, compiling=compiling)})

    assert shapes(0.0) > shapes(300.0) > shapes(1e9) == 1
    for compiling in (300.0, 2000.0):
        assert total(compiling, compiling) < total(0.0, compiling)
        assert total(compiling, compiling) <= total(1e9, compiling)


def test_choices_of_one_token_are_not_read():
    requests = [LikelihoodRequest(str(n), random_tokens(30, seed=n // 4), np.array([n])) for n in range(12)]
    (batch,) = likelihood_batches(requests, 8, 512, compiling=1e9)
    assert batch.shape.width == 1
    assert batch.shape.tokens == 3 * bucket(30)


def test_a_prefix_is_shared_if_that_saves_more_than_its_programs():
    examples, others = random_tokens(150, seed=5), random_tokens(70, seed=6)
    requests = questions(10, prefix=examples, seed=1) + questions(20, seed=2) + questions(2, prefix=others, seed=3)
    batches = list(likelihood_batches(requests, 4, 512, compiling=100.0))
    check(batches, requests, 4, 512)
    assert {len(batch.prefix) for batch in batches} == {0, 128}
    assert all(r.id[0] == ("1" if batch.prefix else r.id[0]) for batch in batches for r in batch.requests)
    assert sum(len(batch.requests) for batch in batches if batch.prefix) == 40
    dear = list(likelihood_batches(requests, 4, 512, compiling=1e5))
    assert {batch.prefix for batch in dear} == {()}


def test_a_context_that_is_all_prefix_keeps_a_token():
    context = random_tokens(96)
    requests = [LikelihoodRequest(str(n), context[: 96 - n % 2], random_tokens(3 + n)) for n in range(4)]
    (batch,) = likelihood_batches(requests, 4, 512, compiling=1.0)
    assert len(batch.prefix) == 80
    check([batch], requests, 4, 512)


def test_a_continuation_longer_than_the_model_is_refused():
    request = LikelihoodRequest("a", random_tokens(3), random_tokens(9))
    assert len(cut_context(request, 9)) == 1
    with pytest.raises(UsageError, match="9 tokens to score"):
        list(likelihood_batches([request], 1, 8, compiling=1.0))
