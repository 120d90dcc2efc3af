"""The latent cache gives what the full cache gives, and what reading the text at once gives.

As in `test_cache`, rings go round several times, and the heads are 6 on 2 key-value heads of 10 dimensions.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.attention import LayerCache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import prefill
from ngc_jax.models.generate import generate
from ngc_jax.models.latent_cache import (
    LatentCache,
    cache_layout,
    init_latent_cache,
    numbers_per_token,
    to_latent_ring,
    write,
)
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling
from ngc_jax.training import sharding
from tests.models.compact import dense_model, random_params

LENGTH = 25
HEADS = {"num_attention_heads": 6}
PIVOTS = (0, 3, 8, 11, 12, 17, 20, 23)
LIFTED = Kernel("lifted", lift=9, seed=3)
# Name -> groups: members as layer and role, rank, kernel, pivots.
GROUPS = {
    "kv": [("0k 0v", 8, Kernel(), None), ("1k 1v", 11, Kernel(), None)],
    "pivots": [("0k 0v", 8, Kernel(), PIVOTS), ("1k 1v", 3, Kernel(), (2, 9, 22))],
    "private": [("0k", 6, Kernel(), None), ("0v", 5, Kernel(), (1, 2, 3, 21, 22)), ("1v", 4, Kernel(), None)],
    "riemannian": [("0q 0k 0v", 7, Kernel("riemannian", metric_rank=2), None), ("1k", 6, Kernel("riemannian"), None)],
    "layers": [("0k 1k", 5, Kernel(), None), ("0v 1v", 4, LIFTED, None)],
}
CASES = [
    ("llama", "kv"),
    ("llama_untied", "private"),  # biases on q k v o
    ("qwen2", "pivots"),  # biases on q k v
    ("qwen3", "riemannian"),  # a norm of every key head
    ("mistral", "layers"),  # windows
    ("gemma3", "pivots"),  # windows in one layer, norms with an offset, soft caps
]
fast_jit = partial(
    jax.jit,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


@fast_jit
def apply(decoder, params, tokens, positions, cache=None, starts=None):
    return decoder.apply({"params": params}, tokens, positions, cache, starts)


def grouped(architecture: str, groups: str, dtype: str = "float32") -> LanguageModel:
    changes = {"attn_logit_softcapping": 3.0} if architecture == "gemma3" else {}
    model = dense_model(architecture, dtype, **HEADS, **changes)
    plans = [
        GroupPlan(names, tuple(model.config.block(int(n[0]), n[1]) for n in names.split()), rank, kernel, pivots)
        for names, rank, kernel, pivots in GROUPS[groups]
    ]
    plan = Plan(tuple(plans))
    return dataclasses.replace(model, plan=plan, params=random_params(Decoder(model.config, plan, jnp.dtype(dtype))))


def with_cache(model: LanguageModel, kind: str) -> LanguageModel:
    return dataclasses.replace(model, cache=kind)


def some_tokens(seed: int = 0, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 259, (rows, LENGTH)).astype(np.int32)


def at_once(model: LanguageModel, tokens: np.ndarray, starts: np.ndarray | None = None) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(apply(model.decoder, model.params, tokens, positions, None, starts)[0])


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("architecture", "groups"), CASES)
def test_prompts_and_steps(architecture, groups):
    """Prompts of unlike lengths, then token by token, row by row at its own position."""
    model, tokens, lengths = grouped(architecture, groups), some_tokens(), np.array([11, 4])
    expected = at_once(model, tokens)
    assert any(layout.widths for layout in cache_layout(model.config, model.plan))
    prompts = np.where(np.arange(11) < lengths[:, None], tokens[:, :11], 7)
    rows = np.arange(2)
    caches = {}
    for kind in ("full", "latent"):
        decoder = with_cache(model, kind).decoder
        logits, caches[kind] = prefill(decoder, model.params, prompts, lengths, LENGTH)
        close(logits, expected[rows, lengths - 1])
    assert any(isinstance(layer, LatentCache) for layer in caches["latent"])
    assert all(isinstance(layer, LayerCache) for layer in caches["full"])
    for step in range(LENGTH - 11):
        at = lengths + step
        both = {}
        for kind, cache in caches.items():
            both[kind], caches[kind] = apply(model.decoder, model.params, tokens[rows, at][:, None], at[:, None], cache)
        close(both["latent"], both["full"])
        close(both["latent"][:, 0], expected[rows, at])


@pytest.mark.parametrize(("architecture", "groups"), [("qwen3", "riemannian"), ("mistral", "layers")])
def test_chunks_of_several_documents(architecture, groups):
    """Chunks shorter and longer than the windows, one of them with padding in its middle; two documents in a row."""
    model, tokens = grouped(architecture, groups), some_tokens(1)
    starts = np.where(np.arange(LENGTH) < 9, 0, 9) * np.ones((2, 1), np.int32)
    expected = at_once(model, tokens, starts)
    assert np.abs(expected - at_once(model, tokens))[:, 9:].max() > 1e-2
    cache = init_latent_cache(model.config, model.plan, "latent", 2, LENGTH, jnp.float32)
    start = 0
    for size in (3, 1, 12, 1, 8):
        here = slice(start, start + size)
        chunk, positions, begins = tokens[:, here], np.tile(np.arange(LENGTH)[here], (2, 1)), starts[:, here]
        if size == 8:
            chunk, positions, begins = (
                np.insert(array, [2, 2], value, axis=1) for array, value in ((chunk, 9), (positions, -1), (begins, 0))
            )
        logits, cache = apply(model.decoder, model.params, chunk, positions, cache, begins)
        close(np.asarray(logits)[:, positions[0] >= 0], expected[:, here])
        start += size
    assert start == LENGTH


@pytest.mark.parametrize("batch", [1, 2])
def test_a_padding_step_leaves_the_cache_as_it_is(batch):
    model = grouped("mistral", "kv")
    lengths = np.array([9, 5])[:batch]
    _, before = prefill(with_cache(model, "latent").decoder, model.params, some_tokens()[:batch, :9], lengths, 16)
    positions = np.where(np.arange(batch) == 0, -1, lengths)[:, None]
    logits, after = apply(model.decoder, model.params, np.full((batch, 1), 3), positions, before)
    assert np.all(np.isfinite(logits))
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(was[0], now[0])
    if batch == 2:
        assert all(new.positions[1].max() == 5 > old.positions[1].max() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", [(1,) * 17, (17,), (5, 1, 1, 10)], ids=str)
def test_a_ring_holds_the_newest_tokens(batch, sizes):
    """Each in the slot of its position, of keys, values and signals alike; a number shows its token."""
    slots, offset = 7, np.array([0, 4])[:batch, None]
    cache = LatentCache(
        jnp.zeros((batch, 2, 3, slots)),
        jnp.zeros((batch, 2, slots, 5)),
        (jnp.zeros((batch, slots, 4)), jnp.zeros((batch, slots, 6))),
        jnp.full((batch, slots), -1),
    )
    start, put = 0, jax.jit(write)

    def fresh(positions):
        number = positions.astype(np.float32)
        keys = number[:, None, None, :] * np.ones((2, 3, 1), np.float32)
        values = number[:, None, :, None] * np.ones((2, 1, 5), np.float32)
        signals = (number[..., None] * np.ones(4, np.float32), -number[..., None] * np.ones(6, np.float32))
        return LatentCache(
            keys * np.ones((2, 3, 1), np.float32), values * np.ones((2, 1, 5), np.float32), signals, positions
        )

    for size in sizes:
        cache = put(cache, fresh(np.arange(start, start + size) + offset))
        start += size
    in_order = fresh(np.arange(start)[None] + 0 * offset)
    for row in range(batch):
        expected = np.full(slots, -1)
        for position in range(start):
            expected[(position + offset[row, 0]) % slots] = position + offset[row, 0]
        np.testing.assert_array_equal(cache.positions[row], expected)
        np.testing.assert_array_equal(cache.keys[row], np.broadcast_to(expected, (2, 3, slots)))
        np.testing.assert_array_equal(cache.values[row], np.broadcast_to(expected[:, None], (2, slots, 5)))
        np.testing.assert_array_equal(cache.signals[0][row], np.broadcast_to(expected[:, None], (slots, 4)))
        np.testing.assert_array_equal(cache.signals[1][row], -np.broadcast_to(expected[:, None], (slots, 6)))
    if batch == 1:  # the same ring from tokens that were stored in order
        for one, other in zip(jax.tree.leaves(to_latent_ring(in_order, slots)), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_the_same(dtype):
    model = grouped("qwen2", "pivots", dtype)
    prompts = [np.arange(5), np.arange(40, 43), np.arange(100, 117)]
    options = {"max_new_tokens": 12, "sampling": Sampling(0.9, top_k=20), "key": jax.random.key(3)}
    full, latent = (generate(with_cache(model, kind), prompts, **options) for kind in ("full", "latent"))
    if dtype == "float32":
        for one, other in zip(full, latent, strict=True):
            np.testing.assert_array_equal(one, other)
    else:  # rounding may change a token, but not the first, for which no key is read from a signal
        assert [row[0] for row in full] == [row[0] for row in latent]
    greedy = [generate(with_cache(model, kind), prompts[:1], max_new_tokens=4)[0] for kind in ("full", "latent")]
    assert dtype == "bfloat16" or np.array_equal(*greedy)


def test_devices_share_the_cache():
    """Rows over two devices, heads over two: the same logits, and the signals' rows are split."""
    model, lengths = grouped("qwen2", "pivots"), np.array([7, 3])
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    # The vocabulary of 259 cannot be split.
    inner, outer = ({n: v for n, v in model.params.items() if ("embed" in n) == out} for out in (False, True))
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, sharding.BATCH)
    placed = {**jax.device_put(inner, sharding.params_shardings(inner, mesh)), **jax.device_put(outer, everywhere)}
    decoder, prompts = with_cache(model, "latent").decoder, some_tokens()[:, :7]
    _, cache = prefill(decoder, model.params, prompts, lengths, 9)
    _, spread = prefill(decoder, placed, jax.device_put(prompts, rows), jax.device_put(lengths, rows), 9)
    assert spread[0].signals[0].sharding.shard_shape(spread[0].signals[0].shape)[0] == 1
    step = np.full((2, 1), 5)
    close(
        apply(decoder, placed, step, lengths[:, None], spread)[0],
        apply(decoder, model.params, step, lengths[:, None], cache)[0],
    )


def test_numbers_per_token():
    """Of what arrays have, and by hand: keys and values have 20 numbers each in a layer."""
    for name, latent, auto in [
        ("kv", 8 + 11, 20 + 8 + 20 + 11),
        ("pivots", 8 + 3, 20 + 8 + 20 + 3),
        ("private", 6 + 5 + 20 + 4, 20 + 5 + 20 + 4),
        ("riemannian", 7 + 6 + 20, 20 + 7 + 20 + 20),
        ("layers", 2 * (5 + 9), 2 * (20 + 9)),
    ]:
        model = grouped("llama", name)
        for kind, expected in (("full", 80), ("latent", latent), ("auto", auto)):
            assert numbers_per_token(model.config, model.plan, kind) == expected
            cache = init_latent_cache(model.config, model.plan, kind, 1, 4, jnp.float32)
            held = [leaf for layer in cache for leaf in jax.tree.leaves(layer._replace(positions=()))]
            assert sum(leaf.size for leaf in held) == 4 * expected
    assert numbers_per_token(model.config, None, "latent") == 80


def test_a_signal_that_is_larger_is_not_kept():
    model = dense_model("llama", **HEADS)
    blocks = [model.config.block(0, role) for role in "qkv"]
    layouts = [
        cache_layout(model.config, Plan((GroupPlan("qkv", tuple(blocks), 24, pivots=tuple(range(24))),)))[0],
        cache_layout(model.config, Plan((GroupPlan("k", (blocks[1],), 20),)))[0],
        cache_layout(model.config, Plan((GroupPlan("kv", (*blocks[1:],), 16, Kernel("lifted", lift=41)),)))[0],
    ]
    assert [layout.numbers for layout in layouts] == [24, 40, 40]
    assert [(layout.keys, layout.values) for layout in layouts] == [("qkv", "qkv"), (None, None), (None, None)]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="cache 'half' is unknown; expected full, latent or auto"):
        cache_layout(dense_model().config, None, "half")
