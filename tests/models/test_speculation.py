"""Speculative decoding: the model's own tokens, whatever the drafter; dropped tokens leave nothing behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngc_jax
from ngc_jax.errors import UsageError
from ngc_jax.models.decoding import NO_TOKEN, begin
from ngc_jax.models.generate import generate, stream
from ngc_jax.models.inference import inference_model
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.speculation import begin_drafting, speculate, with_drafter
from tests.models.compact import compact_model, dense_model
from tests.pages import run_examples

WARM = Sampling(0.7, top_k=50)
KEY = jax.random.key(3)
PROMPTS = [np.array([5, 9, 200]), np.arange(30, 41), np.array([77])]
NEW = 23


@pytest.fixture(scope="module")
def model():
    return dense_model("llama_untied")


def near(model, noise):
    """The model with noise in its weights: a drafter that agrees with it sometimes."""
    leaves, tree = jax.tree.flatten(model.params)
    generator = np.random.default_rng(0)
    moved = [leaf + noise * leaf.std() * generator.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return dataclasses.replace(model, params=jax.tree.unflatten(tree, moved))


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(("drafter", "tokens"), [("itself", 3), ("near", 3), ("near", 1), ("other", 4)])
def test_the_tokens_are_those_without_a_drafter(model, sampling, drafter, tokens):
    draft = {"itself": model, "near": near(model, 0.05), "other": compact_model("llama_untied")}[drafter]
    options = {"max_new_tokens": NEW, "sampling": sampling, "key": KEY}
    expected = generate(model, PROMPTS, **options)
    found = generate(with_drafter(model, draft, tokens), PROMPTS, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rounds_are_as_many_as_the_drafter_deserves(model):
    """The model as its own drafter: every draft stands, each round yields K + 1 tokens."""
    rounds = {}
    for name, draft in {"itself": model, "near": near(model, 0.05), "other": compact_model("llama_untied")}.items():
        lengths, tokens = jnp.array([3]), jnp.asarray(PROMPTS[0])[None]
        remaining, stops = jnp.array([21]), jnp.array([NO_TOKEN])
        first, state = begin(
            model.decoder, model.params, tokens, lengths, remaining, KEY[None], stops, capacity=40,
            sampling=Sampling().arrays,
        )  # fmt: skip
        state = begin_drafting(draft, state, tokens, lengths, 40)
        decoders, params = (model.decoder, draft.decoder), (model.params, draft.params)
        emitted = [np.asarray(first)]
        while int(state.remaining[0]):
            more, state = speculate(decoders, params, state, jnp.int32(2), stops, sampling=Sampling().arrays, tokens=4)
            emitted.append(np.asarray(more[0]))
        emitted = np.concatenate(emitted)
        np.testing.assert_array_equal(emitted[emitted != NO_TOKEN], generate(model, PROMPTS[:1], max_new_tokens=21)[0])
        rounds[name] = int(state.rounds[0])
    assert rounds["itself"] == 4  # 20 tokens after the first
    assert rounds["itself"] < rounds["near"] < rounds["other"] <= 20


def test_rows_end_where_they_do_without_a_drafter(model):
    whole = generate(model, PROMPTS, max_new_tokens=NEW)
    stops = [int(whole[0][6]), int(whole[1][11])]
    expected = generate(model, PROMPTS, max_new_tokens=NEW, stop_tokens=stops)
    found = generate(with_drafter(model, near(model, 0.05)), PROMPTS, max_new_tokens=NEW, stop_tokens=stops)
    assert min(map(len, expected)) < NEW
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_streams_and_other_layouts(model):
    """Chunk by chunk, in the run-time layout, with a drafter whose cache keeps signals."""
    drafter = dataclasses.replace(compact_model("llama_untied"), cache="latent")
    fast = inference_model(with_drafter(model, drafter, 2))
    assert fast.drafter.model.joined
    chunks = list(stream(fast, PROMPTS[1], max_new_tokens=NEW, steps=5))
    assert len(chunks) > 3
    np.testing.assert_array_equal(
        np.concatenate(chunks), generate(inference_model(model), [PROMPTS[1]], max_new_tokens=NEW)[0]
    )


def test_drafters_that_do_not_fit_are_refused(model):
    with pytest.raises(UsageError, match="expected a model with the same tokenizer"):
        with_drafter(model, dense_model("llama_untied", vocab_size=300))
    with pytest.raises(UsageError, match="draft tokens is 0"):
        with_drafter(model, model, 0)
    with pytest.raises(UsageError, match="sliding windows"):
        with_drafter(dense_model("mistral"), dense_model("mistral"))
    with pytest.raises(UsageError, match="table of positions"):
        with_drafter(dense_model("gpt2"), dense_model("gpt2"))
    short = dense_model("llama_untied", max_position_embeddings=16)
    with pytest.raises(UsageError, match="more than the model's 16"):
        generate(with_drafter(model, short), PROMPTS[:1], max_new_tokens=NEW)


def test_the_page_about_it(model, monkeypatch):
    """With tiny models in place of the real ones."""
    tiny = dataclasses.replace(model, name="tiny")
    monkeypatch.setattr(ngc_jax, "load_model", lambda name: tiny, raising=False)
    session = run_examples("howto/speculation.md", least=1)
    np.testing.assert_array_equal(
        session["continuation"], generate(model, "The capital of France is", max_new_tokens=32)[0]
    )
