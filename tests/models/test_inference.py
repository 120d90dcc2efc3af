"""The run-time layout computes what the plain decoder does."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.models import sites
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.generate import generate
from ngc_jax.models.inference import for_inference, inference_model
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.save import save_model
from tests.models.compact import compact_model, dense_model, fixed_gauge_model, random_params
from tests.tiny import forward

HEADS = {"num_attention_heads": 6}
TOKENS = np.array([[3, 7, 250, 11, 90], [4, 4, 8, 1, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])


@pytest.fixture(params=["gathered", "joined", "folded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The form of groups, by the price of a further product."""
    monkeypatch.setattr(sites, "_PRODUCT", {"gathered": -(10**6), "joined": 10**4, "folded": 10**9}[request.param])
    if request.param == "joined":
        monkeypatch.setattr(sites, "_fastest", _always_joined)
    sites.site_of.cache_clear()
    yield request.param
    sites.site_of.cache_clear()


def _always_joined(group: sites.GroupPlan, roles: str, d_in: int, d_out: int) -> sites.Reading:
    return sites.Reading(group.name, roles, group.kernel.signal_width(group.rank), None)


def _readings(model: LanguageModel) -> list[sites.Reading]:
    assert model.plan is not None
    return [
        reading
        for layer in range(model.config.num_layers)
        for part in sites.SITES.values()
        for roles in part
        for reading in sites.site_of(model.config, model.plan, layer, roles).readings
    ]


@pytest.mark.parametrize(
    ("make", "architecture", "changes"),
    [
        (compact_model, "llama_untied", {"ngc_iterations": 2}),
        (fixed_gauge_model, "gemma3", {}),
        (fixed_gauge_model, "llama_untied", {"tie_word_embeddings": True}),
    ],
    ids=["kernels", "gemma3", "biases"],
)
def test_logits_are_the_plain_decoders(
    make: Callable[..., LanguageModel], architecture: str, changes: dict[str, Any], form: str
) -> None:
    model = make(architecture, **HEADS, **changes)
    fast = inference_model(model)
    expected, _ = forward(model.params, TOKENS, POSITIONS, decoder=model.decoder)
    actual, _ = forward(fast.params, TOKENS, POSITIONS, decoder=fast.decoder)
    real = POSITIONS >= 0
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], rtol=2e-4, atol=2e-5)

    readings = _readings(model)
    assert bool(readings) == (form != "folded")
    assert any(reading.pivots for reading in readings) == (form == "gathered" and make is fixed_gauge_model)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_dense_model_computes_the_same(architecture: str) -> None:
    model = dense_model(architecture, **HEADS)
    fast = inference_model(model)
    expected, _ = forward(model.params, TOKENS, decoder=model.decoder)
    actual, _ = forward(fast.params, TOKENS, decoder=fast.decoder)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)
    assert len(jax.tree.leaves(fast.params)) < len(jax.tree.leaves(model.params))
    assert fast.count_parameters() == model.count_parameters()


def test_generation_is_the_same() -> None:
    """The prompt is longer than a window, and the cache a ring."""
    model = fixed_gauge_model("mistral", **HEADS)
    prompts = [np.arange(30, 41), np.array([5, 9, 200])]
    expected = generate(model, prompts, max_new_tokens=9)
    for actual, tokens in zip(generate(inference_model(model), prompts, max_new_tokens=9), expected, strict=True):
        np.testing.assert_array_equal(actual, tokens)


def test_a_single_row_in_bfloat16_is_a_row_of_several() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 1, 40)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((40, 24)), jnp.bfloat16)
    together = sites.product(x, weight, jnp.float32)
    assert together.shape == (3, 1, 24)
    exact = np.asarray(x, np.float64)[:, 0] @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(np.asarray(together)[:, 0], exact, rtol=1e-5, atol=1e-5)
    for row, expected in zip(x, together, strict=True):
        np.testing.assert_allclose(sites.product(row[None], weight, jnp.float32)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_of_a_table(dtype: str) -> None:
    table = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), dtype)
    found = np.asarray(sites.take_columns(table, jnp.array([[6, 0, 7]])), np.float32)
    np.testing.assert_array_equal(found[0, :2], np.asarray(table, np.float32).T[[6, 0]])
    assert np.isnan(found[0, 2]).all()


def test_the_fastest_form_has_the_fewest_numbers_to_read() -> None:
    """By hand, at 512 inputs and outputs: factors cost 2 r 512, in the fixed gauge r (1,024 - r), weights 512 x 512."""
    block = Block("layers.0.attn.o", 512, 512)
    pivots = {rank: tuple(range(rank)) for rank in (8, 200, 480)}
    for rank, expected in ((8, None), (200, pivots[200])):
        found = sites._fastest(GroupPlan("g", (block,), rank, pivots=pivots[rank]), "o", 512, 512)
        assert found == sites.Reading("g", "o", rank, expected)
    for group in (GroupPlan("g", (block,), 480, pivots=pivots[480]), GroupPlan("g", (block,), 260)):
        assert sites._fastest(group, "o", 512, 512) is None
    assert sites._fastest(GroupPlan("g", (block,), 200), "o", 512, 512) == sites.Reading("g", "o", 200, None)


def test_it_is_neither_saved_nor_arranged_again(tmp_path: Path) -> None:
    fast = inference_model(dense_model("llama"))
    with pytest.raises(UsageError, match="run-time layout"):
        save_model(fast, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    decoder, params = for_inference(fast.decoder, fast.params)
    assert decoder is not None
    assert params is fast.params


def test_a_layer_of_which_every_block_is_in_a_group_has_a_run_time_layout() -> None:
    model = dense_model("llama")
    plan = Plan(tuple(GroupPlan(f"one-{block.name}", (block,), 5) for block in model.config.blocks()))
    model = dataclasses.replace(model, plan=plan, params=random_params(Decoder(model.config, plan)))
    assert "attn" not in model.params["layers"]["0"]  # without biases nothing is left of it
    fast = inference_model(model)
    expected, _ = forward(model.params, TOKENS, POSITIONS, decoder=model.decoder)
    actual, _ = forward(fast.params, TOKENS, POSITIONS, decoder=fast.decoder)
    np.testing.assert_allclose(np.asarray(actual)[0], np.asarray(expected)[0], rtol=2e-4, atol=2e-5)
