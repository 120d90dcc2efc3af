"""Generated answers: how they end, and that samples are the same in every batch."""

from ngc_jax.evaluation.predict import plan_batches
from ngc_jax.evaluation.requests import GenerationRequest
from tests.tiny import random_tokens, tiny_model

WARM = {"temperature": 1.5, "top_p": 0.95}


def answers(batches):
    return {
        request.id: response
        for batch in batches
        for request, response in zip(batch.requests, batch.answer(), strict=True)
    }


def test_an_answer_says_whether_it_ended_or_was_cut():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    prompt = random_tokens(9, seed=9)
    whole = answers(plan_batches(model, tokenizer, [GenerationRequest("a", prompt, 6)], 2))["a"]
    assert (whole["tokens"], whole["finish"]) == (6, "length")
    until = GenerationRequest("a", prompt, 6, (whole["text"][3:],))
    assert answers(plan_batches(model, tokenizer, [until], 2))["a"]["finish"] == "stop"
    # The third token of the answer as one that ends it.
    third = int(tokenizer.encode(whole["text"])[2])
    tokenizer.stop_tokens = (third,)
    ended = answers(plan_batches(model, tokenizer, [GenerationRequest("a", prompt, 6)], 2))["a"]
    assert (ended["finish"], ended["text"]) == (
        "stop",
        tokenizer.decode(tokenizer.encode(whole["text"])[: ended["tokens"]]),
    )
    shown = GenerationRequest("a", prompt, 6, special_tokens=True)
    assert answers(plan_batches(model, tokenizer, [shown], 2))["a"]["text"] == ended["text"][:-1]


def test_samples_depend_on_their_seeds_and_not_on_their_batch():
    model, tokenizer = tiny_model(), tiny_model().load_tokenizer()
    requests = [
        GenerationRequest(
            f"{n}/{s}", random_tokens(5 + n, seed=n), 8, temperature=1.5, top_p=0.95, seed=(3, 64 * n + s)
        )
        for n in range(3)
        for s in range(2)
    ]
    found = answers(plan_batches(model, tokenizer, requests, 4))
    assert found["0/0"] != found["0/1"]
    assert answers(plan_batches(model, tokenizer, requests[::-1], 4)) == found
    alone = answers(plan_batches(model, tokenizer, requests[3:4], 4))
    assert alone == {"1/1": found["1/1"]}
    other = [GenerationRequest("0/0", requests[0].prompt, 8, seed=(4, 0), **WARM)]
    assert answers(plan_batches(model, tokenizer, other, 4))["0/0"] != found["0/0"]
    greedy = [GenerationRequest("g", requests[0].prompt, 8)]
    mixed = answers(plan_batches(model, tokenizer, [*requests, *greedy], 4))
    assert mixed["g"] == answers(plan_batches(model, tokenizer, greedy, 4))["g"]
    assert {name: response for name, response in mixed.items() if name != "g"} == found
