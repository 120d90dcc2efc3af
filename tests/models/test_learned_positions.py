"""A decoder with a table of positions: packed documents, padding and caches, and texts that are too long."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.perplexity import evaluate
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.generate import generate
from ngc_jax.models.inference import inference_model
from ngc_jax.models.layerwise import embed
from ngc_jax.training.fit import TrainConfig, train
from tests.models.compact import dense_model, random_params
from tests.tiny import random_tokens

LIMIT = 19


@pytest.fixture(scope="module")
def model():
    return dense_model("gpt2", n_layer=2, n_positions=LIMIT)


@jax.jit
def _sum(table, tokens, positions):
    return table["embed"]["embedding"][tokens] + table["position_embed"]["embedding"][positions]


def test_a_row_of_documents_counts_within_each(model):
    """Packed documents compute what each computes by itself; a row may be longer than the table."""
    first, second = random_tokens(LIMIT, vocab_size=200), random_tokens(7, vocab_size=200, seed=5)
    row = jnp.asarray(np.concatenate([first, second]))[None]
    starts = jnp.asarray([0] * LIMIT + [LIMIT] * 7)[None]
    positions = jnp.arange(LIMIT + 7)[None]
    packed = np.asarray(model.decoder.apply({"params": model.params}, row, positions, None, starts)[0])
    for document, part in ((first, packed[:, :LIMIT]), (second, packed[:, LIMIT:])):
        alone, _ = model.decoder.apply({"params": model.params}, jnp.asarray(document)[None])
        np.testing.assert_allclose(part, np.asarray(alone), atol=2e-5)


def test_the_stream_before_the_first_layer(model):
    tokens = jnp.asarray(random_tokens(9, vocab_size=200))
    expected = _sum(model.params, tokens, jnp.arange(9))
    np.testing.assert_allclose(embed(model.decoder, model.params, tokens), expected, atol=1e-6)
    moved = embed(model.decoder, model.params, tokens, jnp.arange(9) + 6, jnp.full(9, 4))
    np.testing.assert_allclose(moved, _sum(model.params, tokens, jnp.arange(9) + 2), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_continuations_to_the_end_of_the_table(tied):
    """With full and latent caches and in the run-time layout, as a pass over everything; then no further."""
    dense = dense_model("gpt2", n_layer=2, n_positions=LIMIT, tie_word_embeddings=tied)
    groups = (GroupPlan("0-kv", (dense.config.block(0, "k"), dense.config.block(0, "v")), 8),)
    params = random_params(Decoder(dense.config, Plan(groups)))
    # Positions that outweigh tokens: a wrong one changes the continuation.
    params["position_embed"] = {"embedding": 4 * params["position_embed"]["embedding"]}
    compact = dataclasses.replace(dense, plan=Plan(groups), params=params)
    prompts = [random_tokens(5, vocab_size=200), random_tokens(3, vocab_size=200, seed=2)]
    models = [dataclasses.replace(compact, cache=kind) for kind in ("full", "latent")]
    models.append(inference_model(compact))
    new = LIMIT - 5
    found = [generate(one, prompts, max_new_tokens=new) for one in models]
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, found[0][row]])
        logits, _ = compact.decoder.apply({"params": params}, jnp.asarray(whole)[None])
        expected = np.asarray(logits)[0, len(prompt) - 1 : -1].argmax(-1)
        assert len(np.unique(expected)) > 5
        for continuations in found:
            np.testing.assert_array_equal(continuations[row], expected)
    with pytest.raises(UsageError, match=f"more than the model's {LIMIT}"):
        generate(models[1], prompts, max_new_tokens=new + 1)


def test_texts_beyond_the_table_are_refused_wherever_they_come_in(model):
    tokens = random_tokens(40, vocab_size=200)
    message = f"{LIMIT + 1} tokens in a row, but the model has learned positions for {LIMIT}"
    row = jnp.asarray(tokens)[None, : LIMIT + 1]
    with pytest.raises(UsageError, match=message):
        model.decoder.apply({"params": model.params}, row)
    with pytest.raises(UsageError, match=message):
        model.decoder.apply({"params": model.params}, row[:, :1], jnp.asarray([[LIMIT]]))
    with pytest.raises(UsageError, match=message):
        embed(model.decoder, model.params, row)
    with pytest.raises(UsageError, match=message):
        evaluate(model, tokens, window=LIMIT + 1)
    with pytest.raises(UsageError, match=message):
        train(model, tokens, config=TrainConfig(steps=1, sequence_length=LIMIT + 1))


def test_a_position_that_is_not_known_when_compiled_is_not_made_up(model):
    """Beyond the table it makes numbers that no one takes for logits; padding reads a row that exists."""
    positions = jnp.asarray([[LIMIT - 1, LIMIT, -1]])
    tokens = jnp.asarray([[3, 3, 3]])
    apply = jax.jit(lambda at: model.decoder.apply({"params": model.params}, tokens, at, method="embedded"))
    found = np.asarray(apply(positions))
    assert np.isnan(found[0]).all(axis=-1).tolist() == [False, True, False]
