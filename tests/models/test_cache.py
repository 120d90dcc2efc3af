"""The key-value cache: reading a text piece by piece gives what reading it at once gives.

Windows are far shorter than the texts, so rings go round several times. The heads do not divide evenly into numbers
that could be confused: 6 query heads on 2 key-value heads of 10 dimensions.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.models.attention import Cache, LayerCache, init_cache, to_rings, write_cache
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import prefill
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params
from tests.models.compact import compact_model, dense_model
from tests.tiny import HF_CONFIGS

LENGTH = 33
HEADS = {"num_attention_heads": 6}
MODELS = [
    *(pytest.param(dense_model, architecture, id=architecture) for architecture in HF_CONFIGS),
    pytest.param(compact_model, "gemma3", id="compact gemma3"),
]


@partial(jax.jit, static_argnums=0)
def apply(
    decoder: Decoder, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache | None = None
) -> tuple[jax.Array, Cache | None]:
    return decoder.apply({"params": params}, tokens, positions, cache)


def some_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 259, (2, LENGTH)).astype(np.int32)


def at_once(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(apply(model.decoder, model.params, tokens, positions)[0])


@pytest.mark.parametrize(("make", "architecture"), MODELS)
def test_prompts_and_steps(make: Callable[..., LanguageModel], architecture: str) -> None:
    """Prompts of unlike lengths in one pass, then token by token, row by row at its own position."""
    model, tokens, lengths = make(architecture, **HEADS), some_tokens(), np.array([11, 4])
    expected = at_once(model, tokens)
    prompts = np.where(np.arange(11) < lengths[:, None], tokens[:, :11], 7)
    logits, cache = prefill(model.decoder, model.params, prompts, lengths, LENGTH)
    rows = np.arange(2)
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=2e-5)
    for step in range(LENGTH - 11):
        at = lengths + step
        logits, cache = apply(model.decoder, model.params, tokens[rows, at][:, None], at[:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, at], atol=2e-5)


@pytest.mark.parametrize(
    ("make", "architecture"), [(dense_model, "llama"), (dense_model, "mistral"), (compact_model, "gemma3")]
)
def test_chunks(make: Callable[..., LanguageModel], architecture: str) -> None:
    """Chunks shorter and longer than the windows, one of them with padding in its middle."""
    model, tokens = make(architecture, **HEADS), some_tokens(1)
    expected = at_once(model, tokens)
    cache = init_cache(model.config, 2, LENGTH, jnp.float32)
    start = 0
    for size in (3, 1, 12, 12, 5):
        chunk, positions = tokens[:, start : start + size], np.tile(np.arange(start, start + size), (2, 1))
        if size == 5:
            chunk, positions = np.insert(chunk, [2, 2], 9, axis=1), np.insert(positions, [2, 2], -1, axis=1)
        logits, cache = apply(model.decoder, model.params, chunk, positions, cache)
        real = positions[0] >= 0
        np.testing.assert_allclose(logits[:, real], expected[:, start : start + size], atol=2e-5)
        start += size
    assert start == LENGTH


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_prompt_logits_depend_on_the_own_prompt_only(architecture: str) -> None:
    """By gradient: not on padding, not on the other row; on every token of its own that it can see."""
    model = dense_model(architecture, **HEADS)
    tokens = jnp.arange(14).reshape(2, 7)  # all different, so that an embedding's gradient is that of one token
    lengths = jnp.array([4, 7])

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder: Decoder, params: Params, row: int) -> jax.Array:
        def summary(embedding: jax.Array) -> jax.Array:
            logits, _ = prefill(decoder, {**params, "embed": {"embedding": embedding}}, tokens, lengths, 9)
            return jnp.sum(jnp.sin(logits[row, 20:]))  # not the entries that unembed the prompts' own tokens

        return jax.grad(summary)(params["embed"]["embedding"])

    for row, own in enumerate(([0, 1, 2, 3], [7, 8, 9, 10, 11, 12, 13])):
        size = np.abs(gradient(model.decoder, model.params, row)).max(axis=1)[:14]
        np.testing.assert_array_equal(np.flatnonzero(size > 1e-6), own)
        assert np.all(np.delete(size, own) == 0)


def test_content_of_padding_does_not_matter() -> None:
    """Neither for the logits nor for what the cache holds."""
    model, lengths = dense_model("gemma3", **HEADS), np.array([9, 3])
    tokens, other = some_tokens()[:, :12], some_tokens(1)[:, :12]
    padded = np.where(np.arange(12) < lengths[:, None], tokens, other)
    assert not np.array_equal(tokens, padded)
    first, second = (prefill(model.decoder, model.params, prompts, lengths, 16) for prompts in (tokens, padded))
    np.testing.assert_array_equal(first[0], second[0])
    for one, two in zip(first[1], second[1], strict=True):
        held = one.positions >= 0
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_array_equal(held.sum(axis=1), np.minimum(lengths, held.shape[1]))
        keys = np.moveaxis(np.asarray(one.keys), 3, 1), np.moveaxis(np.asarray(two.keys), 3, 1)
        np.testing.assert_array_equal(keys[0][held], keys[1][held])
        values = np.moveaxis(np.asarray(one.values), 2, 1), np.moveaxis(np.asarray(two.values), 2, 1)
        np.testing.assert_array_equal(values[0][held], values[1][held])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_padding_step_leaves_the_cache_as_it_is(batch: int) -> None:
    """Rows that have ended are fed padding while others go on."""
    model = dense_model("mistral", **HEADS)
    lengths = np.array([9, 5])[:batch]
    _, before = prefill(model.decoder, model.params, some_tokens()[:batch, :9], lengths, 16)
    positions = np.where(np.arange(batch) == 0, -1, lengths)[:, None]
    logits, after = apply(model.decoder, model.params, np.full((batch, 1), 3), positions, before)
    assert np.all(np.isfinite(logits))
    for old, new in zip(before, after, strict=True):
        for was, now in zip(old, new, strict=True):
            np.testing.assert_array_equal(was[0], now[0])
        if batch == 2:
            assert new.positions[1].max() == 5 > old.positions[1].max()


def ring_by_hand(position_of_token: list[int], slots: int) -> list[int]:
    """What each slot holds after tokens were put in one at a time."""
    ring = [-1] * slots
    for position in position_of_token:
        ring[position % slots] = position
    return ring


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", [(1,) * 17, (17,), (5, 1, 1, 10), (12, 5)], ids=str)
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_a_ring_holds_the_newest_tokens(batch: int, sizes: tuple[int, ...], order: int) -> None:
    """Each in the slot of its position, whether it came alone or with others; keys tell where they came from."""
    slots, heads, head_dim = 7, 2, 3
    cache = LayerCache(
        jnp.zeros((batch, heads, head_dim, slots), jnp.bfloat16),
        jnp.zeros((batch, heads, slots, head_dim), jnp.bfloat16),
        jnp.full((batch, slots), -1),
    )
    offset = np.array([0, 4])[:batch, None]
    write = jax.jit(write_cache)
    start = 0
    for size in sizes:
        positions = (np.arange(start, start + size) + offset)[:, ::order]
        of_head = np.add.outer(positions, [0.0, 0.5])
        k = np.repeat(of_head[..., None], head_dim, axis=-1).astype(np.float32)
        cache = write(cache, k, -k, positions)
        start += size
    assert cache.keys.dtype == jnp.bfloat16
    for row in range(batch):
        expected = ring_by_hand(list(np.arange(start) + offset[row]), slots)
        np.testing.assert_array_equal(cache.positions[row], expected)
        for head, shift in enumerate([0.0, 0.5]):
            np.testing.assert_array_equal(cache.keys[row, head], np.tile(np.add(expected, shift), (head_dim, 1)))
            np.testing.assert_array_equal(cache.values[row, head].T, -np.tile(np.add(expected, shift), (head_dim, 1)))


@pytest.mark.parametrize("length", [4, 7, 8, 30])
def test_prompts_go_into_the_rings_that_they_would_have_been_written_to(length: int) -> None:
    config = DecoderConfig.from_hf({**HF_CONFIGS["gemma3"], **HEADS, "sliding_window": 7})
    rng = np.random.default_rng(0)
    lengths = np.array([length, length - 3])
    index = np.arange(length)
    positions = np.where(index < lengths[:, None], index, -1)
    k, v = rng.standard_normal((2, 2, length, 2, 10)).astype(np.float32)
    prompts = LayerCache(jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.swapaxes(1, 2)), jnp.asarray(positions))
    rings = to_rings(config, (prompts,) * config.num_layers, 32)
    empty = init_cache(config, 2, 32, jnp.float32)
    for ring, layer in zip(rings, empty, strict=True):
        written = write_cache(layer, jnp.asarray(k), jnp.asarray(v), jnp.asarray(positions))
        np.testing.assert_array_equal(ring.positions, written.positions)
        held = (written.positions >= 0)[:, None]
        np.testing.assert_array_equal(jnp.where(held[:, :, None], ring.keys, 0.0), written.keys)
        np.testing.assert_array_equal(jnp.where(held[..., None], ring.values, 0.0), written.values)


def test_a_window_bounds_the_cache() -> None:
    config = DecoderConfig.from_hf({**HF_CONFIGS["gemma3"], **HEADS})
    assert config.windows == (5, None, 5)
    cache = init_cache(config, 3, 100, jnp.bfloat16)
    assert [layer.keys.shape for layer in cache] == [(3, 2, 10, 5), (3, 2, 10, 100), (3, 2, 10, 5)]
    assert [layer.values.shape for layer in cache] == [(3, 2, 5, 10), (3, 2, 100, 10), (3, 2, 5, 10)]
    assert {layer.keys.dtype for layer in cache} == {jnp.dtype(jnp.bfloat16)}
    assert init_cache(config, 3, 4, jnp.float32)[0].keys.shape == (3, 2, 10, 4)
