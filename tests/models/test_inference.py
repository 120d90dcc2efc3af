"""The run-time layout computes what the plain decoder does."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models import sites
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel
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


@pytest.mark.parametrize("architecture", ["llama_untied", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("make", [compact_model, fixed_gauge_model])
def test_logits_are_the_plain_decoders(make: Callable[..., LanguageModel], architecture: str, form: str) -> None:
    model = make(architecture, **HEADS)
    fast = inference_model(model)
    expected, _ = forward(model.params, TOKENS, POSITIONS, decoder=model.decoder)
    actual, _ = forward(fast.params, TOKENS, POSITIONS, decoder=fast.decoder)
    real = POSITIONS >= 0
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], rtol=2e-4, atol=2e-5)
    readings = [
        reading
        for layer in range(2)
        for part in sites.SITES.values()
        for roles in part
        for reading in sites.site_of(model.config, model.plan, layer, roles).readings
    ]
    assert bool(readings) == (form != "folded")
    if make is fixed_gauge_model and form == "gathered":
        assert any(reading.pivots for reading in readings)


def test_a_layer_of_which_every_block_is_in_a_group_has_a_run_time_layout() -> None:
    model = dense_model("llama")
    plan = Plan(tuple(GroupPlan(f"one-{block.name}", (block,), 5) for block in model.config.blocks()))
    model = dataclasses.replace(model, plan=plan, params=random_params(Decoder(model.config, plan)))
    assert "attn" not in model.params["layers"]["0"]  # without biases nothing is left of it
    fast = inference_model(model)
    expected, _ = forward(model.params, TOKENS, POSITIONS, decoder=model.decoder)
    actual, _ = forward(fast.params, TOKENS, POSITIONS, decoder=fast.decoder)
    np.testing.assert_allclose(np.asarray(actual)[0], np.asarray(expected)[0], rtol=2e-4, atol=2e-5)
