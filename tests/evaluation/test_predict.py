"""Responses against log-softmax in float64 of the plain decoder's logits, and against its own greedy tokens."""

import jax
import numpy as np
import pytest
import scipy.special

from ngc_jax.errors import UsageError
from ngc_jax.evaluation import predict
from ngc_jax.evaluation.predict import plan_batches
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest
from ngc_jax.models.generate import generate
from ngc_jax.models.sampling import Sampling
from tests.models.compact import fixed_gauge_model
from tests.tiny import forward, random_tokens, tiny_model


def logits_of(model, tokens):
    padded = np.zeros(128, np.int32)  # one program for all; the causal mask hides what follows
    padded[: len(tokens)] = tokens
    return np.asarray(forward(model.params, padded[None], decoder=model.decoder)[0], np.float64)[0, : len(tokens)]


def expected(model, context, continuation):
    """The log-likelihood, and whether every token is the likeliest."""
    whole = np.concatenate([context, continuation])
    logits = logits_of(model, whole)
    places = np.arange(len(context), len(whole))
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    return (
        log_probabilities[places - 1, whole[places]].sum(),
        bool((logits[places - 1].argmax(axis=-1) == whole[places]).all()),
    )


def greedy_tokens(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return np.array(ids[len(context) :], np.int32)


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
    for number, count in ((0, 1), (2, 4)):  # the likeliest continuations, and one whose last token is another
        context = requests[number].context
        likeliest = greedy_tokens(model, context, count)
        other = np.append(likeliest[:-1], (likeliest[-1] + 1) % 256)
        requests += [
            LikelihoodRequest(f"g{number}", context, likeliest),
            LikelihoodRequest(f"o{number}", context, other),
        ]
    batches = plan_batches(model, model.load_tokenizer(), requests, 2)
    found = answers(batches)
    assert len(found) == len(requests)
    assert len(batches) < len(requests)
    for request in requests:
        likelihood, greedy = expected(model, request.context, request.continuation)
        assert found[request.id]["log_likelihood"] == pytest.approx(likelihood, rel=1e-4, abs=1e-4)
        assert found[request.id]["greedy"] == greedy
        assert found[request.id]["tokens"] == len(request.continuation)
    assert [found[name]["greedy"] for name in ("g0", "g2", "o0", "o2")] == [True, True, False, False]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # the latter with windows of five tokens
def test_a_shared_prefix_is_read_once(architecture, monkeypatch):
    monkeypatch.setattr(predict, "_COMPILING", {})
    monkeypatch.setattr(predict, "_COMPILING_ELSEWHERE", 1.0)
    read, reads = predict.read_prefix, []
    monkeypatch.setattr(predict, "read_prefix", lambda *given: reads.append(given[2].shape) or read(*given))
    model, prefix = tiny_model(architecture), random_tokens(75, seed=8)
    requests = [
        LikelihoodRequest(
            f"{number}/{choice}",
            np.append(prefix, random_tokens(3 * number + 1, seed=number)),
            random_tokens(choice + 1),
        )
        for number in range(5)
        for choice in range(2)
    ]
    found = answers(plan_batches(model, model.load_tokenizer(), requests, 2))
    assert reads == [(1, 64)]
    for request in requests:
        likelihood, greedy = expected(model, request.context, request.continuation)
        assert found[request.id]["log_likelihood"] == pytest.approx(likelihood, rel=1e-4, abs=1e-4)
        assert found[request.id]["greedy"] == greedy


def test_generated_texts_are_greedy_and_end_before_the_given_texts():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    prompts = [random_tokens(length, seed=length) for length in (3, 9, 40)]
    requests = [GenerationRequest(str(n), prompt, 6) for n, prompt in enumerate(prompts)]
    found = answers(plan_batches(model, tokenizer, requests, 2))
    for request in requests:
        ids = greedy_tokens(model, request.prompt, 6)
        stops = np.flatnonzero(np.isin(ids, tokenizer.stop_tokens))
        ids = ids[: stops[0] + 1] if len(stops) else ids
        assert found[request.id]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    whole = found["1"]["text"]
    until = GenerationRequest("1", prompts[1], 6, (whole[2:], whole[1:]))
    assert answers(plan_batches(model, tokenizer, [until], 2))["1"]["text"] == whole[:1]


def test_long_prompts_lose_their_first_tokens_and_the_response_says_so():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    limit = model.config.max_length
    context, continuation = random_tokens(limit, seed=1), random_tokens(3, seed=2)
    (batch,) = plan_batches(model, tokenizer, [LikelihoodRequest("a", context, continuation)], 1)
    # The last of the three tokens is predicted, and never read.
    shorter = LikelihoodRequest("a", context[2:], continuation)
    (other,) = plan_batches(model, tokenizer, [shorter], 1)
    (found,), (wanted,) = batch.answer(), other.answer()
    assert found["cut"] == 2
    assert "cut" not in wanted
    assert found["log_likelihood"] == pytest.approx(wanted["log_likelihood"], rel=1e-5)
    with pytest.raises(UsageError, match="leaves no room"):
        plan_batches(model, tokenizer, [GenerationRequest("b", context, limit)], 1)
    with pytest.raises(UsageError, match="the same id"):
        plan_batches(model, tokenizer, [shorter, shorter], 1)
    (batch,) = plan_batches(model, tokenizer, [LikelihoodRequest("a", context, continuation)], 1, max_length=20)
    assert batch.answer()[0]["cut"] == limit - 18


def test_samples_depend_on_their_seeds_alone():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    prompt, sampling = random_tokens(5), Sampling(1.5, top_p=0.9, top_k=99)
    how = {"temperature": 1.5, "top_p": 0.9, "top_k": 99}
    requests = [GenerationRequest(f"{seed}", prompt, 8, seed=(3, seed), **how) for seed in range(3)]
    requests += [GenerationRequest("other", prompt, 8, seed=(4, 0), **how), GenerationRequest("greedy", prompt, 8)]
    found = answers(plan_batches(model, tokenizer, requests, 2))
    assert len({response["text"] for response in found.values()}) > 3
    options = {"max_new_tokens": 8, "sampling": sampling, "stop_tokens": tokenizer.stop_tokens}
    for seed in range(3):
        (ids,) = generate(model, [prompt], key=jax.random.key(3), seeds=[seed], **options)
        assert found[str(seed)]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert found[str(seed)]["finish"] == ("stop" if ids[-1] in tokenizer.stop_tokens else "length")
