import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import token_log_likelihoods
from ngc_jax.evaluation.perplexity import measure_perplexity, scored_bytes
from tests.tiny import forward, random_tokens, tiny_model, tiny_tokenizer


def reference_nats(model, tokens, window):
    """Negative log-likelihood in float64, each window run alone, and the number of scored tokens."""
    nats, scored = 0.0, 0
    for start in range(0, len(tokens), window):
        piece = tokens[start : start + window]
        logits = np.asarray(forward(model.params, piece[None], decoder=model.decoder)[0][0], np.float64)
        normal = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += sum(normal[i] - logits[i, piece[i + 1]] for i in range(len(piece) - 1))
        scored += len(piece) - 1
    return nats, scored


@pytest.mark.parametrize(("count", "window", "batch_size"), [(96, 16, 2), (75, 16, 4), (20, 64, 3), (33, 16, 1)])
def test_perplexity_is_that_of_every_window_alone(count, window, batch_size):
    model, tokens = tiny_model("gemma3"), random_tokens(count)
    nats, scored = reference_nats(model, tokens, window)
    result = measure_perplexity(model, tokens, tokenizer=tiny_tokenizer(), window=window, batch_size=batch_size)
    assert result.tokens == scored
    assert result.perplexity == pytest.approx(math.exp(nats / scored), rel=1e-5)
    # One token is one byte for this tokenizer.
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / scored, rel=1e-5)
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_nothing(chunk):
    model = tiny_model()
    tokens = jnp.asarray(random_tokens(26).reshape(2, 13))
    positions = jnp.where(jnp.arange(13) < jnp.array([[13], [9]]), jnp.arange(13), -1)
    score = jax.jit(token_log_likelihoods, static_argnames=("decoder", "chunk"))
    scores, mask = score(model.decoder, model.params, tokens, positions, chunk=chunk)
    logits, _ = model.decoder.apply({"params": model.params}, tokens, positions)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_array_equal(mask.sum(1), [12, 8])
    np.testing.assert_allclose(scores, expected * mask, atol=1e-5)


def test_bytes_are_those_of_all_but_first_tokens():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("héllo wörld, ünïcode")
    assert scored_bytes(tokens, len(tokens), tokenizer) == len(tokens) - 1
    # Cutting through a character does not lose its bytes.
    assert scored_bytes(tokens, 2, tokenizer) == len(tokens) - math.ceil(len(tokens) / 2)


def test_errors():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(UsageError, match="expected at least 2"):
        measure_perplexity(model, random_tokens(1), tokenizer=tokenizer)
    with pytest.raises(UsageError, match="window 1"):
        measure_perplexity(model, random_tokens(9), tokenizer=tokenizer, window=1)
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    with pytest.raises(UsageError, match="not finite"):
        measure_perplexity(broken, random_tokens(9), tokenizer=tokenizer)
