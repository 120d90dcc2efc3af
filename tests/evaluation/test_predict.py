"""Responses against log-softmax in float64 of the plain decoder's logits, and against its own greedy tokens."""

import numpy as np
import pytest
import scipy.special

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.predict import plan_batches
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest
from tests.models.compact import fixed_gauge_model
from tests.tiny import forward, random_tokens, tiny_model


def expected_likelihood(model, context, continuation):
    whole = np.concatenate([context, continuation])
    padded = np.zeros(64, np.int32)  # one program for all; the causal mask hides what follows
    padded[: len(whole)] = whole
    logits = np.asarray(forward(model.params, padded[None], decoder=model.decoder)[0], np.float64)[0]
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    places = np.arange(len(context), len(whole))
    return log_probabilities[places - 1, whole[places]].sum()


def likelihood_requests():
    """Contexts of unlike lengths, some of them with several continuations, of one to eleven tokens."""
    lengths = [(5, (1, 3, 2)), (16, (1, 1)), (17, (4,)), (30, (11, 2, 9, 1, 5)), (1, (2, 2))]
    made = []
    for number, (length, counts) in enumerate(lengths):
        context = random_tokens(length, seed=number)
        for choice, count in enumerate(counts):
            continuation = random_tokens(count, seed=100 * number + choice + 50)
            made.append(LikelihoodRequest(f"{number}/{choice}", context, continuation))
    return made


def answers(batches):
    return {
        request.id: response
        for batch in batches
        for request, response in zip(batch.requests, batch.answer(), strict=True)
    }


@pytest.mark.parametrize("make", [lambda: tiny_model("gemma3"), fixed_gauge_model])
def test_log_likelihoods_are_those_of_the_plain_decoder(make):
    model = make()
    requests = likelihood_requests()
    batches = plan_batches(model, model.load_tokenizer(), requests, 2)
    found = answers(batches)
    assert len(found) == len(requests)
    assert len(batches) < len(requests)
    for request in requests:
        expected = expected_likelihood(model, request.context, request.continuation)
        assert found[request.id]["log_likelihood"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert found[request.id]["tokens"] == len(request.continuation)


def test_choices_of_one_context_are_in_one_batch_and_few_shapes_are_compiled():
    model = tiny_model()
    batches = plan_batches(model, model.load_tokenizer(), likelihood_requests(), 8)
    sizes = {batch.answer.args[2] for batch in batches}
    assert sizes == {(16, 8), (32, 8), (32, 16)}
    assert {request.id for batch in batches if batch.answer.args[2] == (16, 8) for request in batch.requests} >= {
        "0/0",
        "0/1",
        "0/2",
        "1/0",
        "1/1",
        "4/0",
    }


def test_generated_texts_are_greedy_and_end_before_the_given_texts():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    prompts = [random_tokens(length, seed=length) for length in (3, 9, 40)]
    requests = [GenerationRequest(str(n), prompt, 6) for n, prompt in enumerate(prompts)]
    found = answers(plan_batches(model, tokenizer, requests, 2))
    for request in requests:
        ids = list(request.prompt)
        for _ in range(6):
            padded = np.zeros(64, np.int32)
            padded[: len(ids)] = ids
            logits, _ = forward(model.params, padded[None], decoder=model.decoder)
            ids.append(int(np.asarray(logits)[0, len(ids) - 1].argmax()))
            if ids[-1] in tokenizer.stop_tokens:
                break
        assert found[request.id]["text"] == tokenizer.decode(ids[len(request.prompt) :], skip_special_tokens=True)
    whole = found["1"]["text"]
    until = GenerationRequest("1", prompts[1], 6, (whole[2:], whole[1:]))
    assert answers(plan_batches(model, tokenizer, [until], 2))["1"]["text"] == whole[:1]


def test_long_prompts_lose_their_first_tokens_and_the_response_says_so():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    limit = model.config.max_length
    context, continuation = random_tokens(limit, seed=1), random_tokens(3, seed=2)
    (batch,) = plan_batches(model, tokenizer, [LikelihoodRequest("a", context, continuation)], 1)
    shorter = LikelihoodRequest("a", context[3:], continuation)
    (expected,) = plan_batches(model, tokenizer, [shorter], 1)
    (found,), (wanted,) = batch.answer(), expected.answer()
    assert found["cut"] == 3
    assert "cut" not in wanted
    assert found["log_likelihood"] == pytest.approx(wanted["log_likelihood"], rel=1e-5)
    with pytest.raises(UsageError, match="leaves no room"):
        plan_batches(model, tokenizer, [GenerationRequest("b", context, limit)], 1)
    with pytest.raises(UsageError, match="the same id"):
        plan_batches(model, tokenizer, [shorter, shorter], 1)
