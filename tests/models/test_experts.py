"""Mixtures of experts: routing, the two ways to multiply, forms of weights, and what is read and written."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig, Experts
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.experts import form_of, multiply, route
from ngc_jax.models.inference import inference_model
from ngc_jax.models.layers import input_site
from ngc_jax.models.load import LanguageModel, kernel_of, load_model
from ngc_jax.models.save import save_model
from tests.models.compact import compact_plan, dense_equivalent, random_params
from tests.tiny import HF_CONFIGS, forward, random_tokens, tiny_tokenizer

QWEN = {
    **HF_CONFIGS["qwen3"],
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "mlp_only_layers": [1],
}


def sparse_model(hf_config=QWEN, plan=None) -> LanguageModel:
    config = DecoderConfig.from_hf(hf_config)
    params = random_params(Decoder(config, plan))
    return LanguageModel("tiny", config, plan, params, hf_config, tiny_tokenizer)


def logits(model: LanguageModel, count: int = 24) -> np.ndarray:
    return np.asarray(forward(model.params, random_tokens(count)[None], decoder=model.decoder)[0])


def some_rows(tokens: int = 17, experts: int = 4, per_token: int = 3):
    what = Experts(experts, per_token, 8, (True,), normalised=False)
    return route(what, jnp.asarray(np.random.default_rng(0).standard_normal((tokens, experts))))


def test_rows_are_sorted_and_lead_back_to_their_tokens() -> None:
    rows = some_rows()
    assert (np.diff(rows.experts) >= 0).all()
    np.testing.assert_array_equal(rows.sizes, np.bincount(rows.experts, minlength=4))
    np.testing.assert_array_equal(rows.tokens[rows.places], np.repeat(np.arange(17)[:, None], 3, axis=1))
    logits_TxE = np.random.default_rng(0).standard_normal((17, 4))
    weights = np.exp(logits_TxE) / np.exp(logits_TxE).sum(-1, keepdims=True)
    np.testing.assert_allclose(rows.weights, weights[rows.tokens, rows.experts], rtol=1e-5)
    # The expert that is not chosen is the least likely.
    np.testing.assert_array_equal(rows.experts[rows.places].sum(-1), 6 - weights.argmin(-1))


@pytest.mark.parametrize("tokens", [1, 17, 300], ids=["gathered", "sorted", "many"])
@pytest.mark.parametrize("backend", ["cpu", "tpu"], ids=["blocks", "ragged"])
def test_products_and_their_gradients(tokens, backend, monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rows = some_rows(tokens)
    assert (rows.sizes is None) == (tokens == 1)
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((len(rows.tokens), 6)), rng.standard_normal((4, 7, 6))
    expected = np.einsum("ri,roi->ro", x, w[np.asarray(rows.experts)])
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    np.testing.assert_allclose(multiply(rows, *inputs), expected, rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda x, w: (multiply(rows, x, w) ** 2).sum() / 2, argnums=(0, 1))(*inputs)
    by_row = np.einsum("ro,ri->roi", expected, x)
    by_weight = np.stack([by_row[np.asarray(rows.experts) == expert].sum(0) for expert in range(4)])
    np.testing.assert_allclose(
        found[0], np.einsum("ro,roi->ri", expected, w[np.asarray(rows.experts)]), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found[1], by_weight, rtol=1e-4, atol=1e-3)


def test_one_expert_is_a_dense_mlp() -> None:
    one = {**QWEN, "num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 40, "mlp_only_layers": []}
    model = sparse_model(one)
    dense = dataclasses.replace(model, config=DecoderConfig.from_hf(HF_CONFIGS["qwen3"]))
    layers = {
        name: {**layer, "mlp": {role: {"kernel": layer["mlp"][role]["kernel"][0]} for role in "ugd"}}
        for name, layer in model.params["layers"].items()
    }
    dense = dataclasses.replace(dense, params={**model.params, "layers": layers})
    np.testing.assert_allclose(logits(model), logits(dense), atol=2e-5)


def test_the_order_of_experts_does_not_matter() -> None:
    model, order = sparse_model(), np.array([3, 0, 4, 1, 2])
    layers = {
        name: layer if name == "1" else {**layer, "mlp": jax.tree.map(lambda leaf: leaf[order], layer["mlp"])}
        for name, layer in model.params["layers"].items()
    }
    other = dataclasses.replace(model, params={**model.params, "layers": layers})
    np.testing.assert_allclose(logits(other), logits(model), atol=2e-5)


def test_blocks_of_experts() -> None:
    config = DecoderConfig.from_hf(QWEN)
    assert len(config.blocks()) == 2 * (4 + 3 * 5) + 7
    assert config.block(2, "d", 4).name == "layers.2.mlp.d.4"
    assert (config.block(2, "d", 4).d_in, config.block(1, "d").d_in) == (14, 40)
    for wrong in ((2, "d"), (1, "d", 0), (0, "q", 0)):
        with pytest.raises(KeyError):
            config.block(*wrong)
    assert input_site("layers.2.mlp.u.4") == input_site("layers.2.mlp.g.1")
    assert input_site("layers.2.mlp.d.4") != input_site("layers.2.mlp.d.1")
    model = sparse_model()
    assert kernel_of(model.params, "layers.2.mlp.u.4").shape == (14, 24)


def test_groups_of_experts_compute_what_their_weights_do() -> None:
    config = DecoderConfig.from_hf(QWEN)
    plan = compact_plan(config)
    assert [form_of(config, plan, 0, role).kind for role in "ugd"] == ["shared", "shared", "dense"]
    assert [form_of(config, plan, 2, role).kind for role in "ugd"] == ["dense", "dense", "own"]
    model = sparse_model(plan=plan)
    expected = logits(dense_equivalent(model))
    np.testing.assert_allclose(logits(model), expected, atol=5e-5)
    np.testing.assert_allclose(logits(inference_model(model)), expected, atol=5e-5)
    np.testing.assert_allclose(logits(model, 1), expected[:, :1], atol=5e-5)  # fewer rows than experts


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    model = sparse_model(plan=compact_plan(DecoderConfig.from_hf(QWEN)))
    again = load_model(str(save_model(model, tmp_path / "model")))
    assert again.plan == model.plan
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in names  # of the expert without a group
    assert "model.layers.2.mlp.experts.1.up_proj.weight" not in names


def test_stacked_tensors_are_read_too(tmp_path) -> None:
    model = sparse_model()
    file = save_model(model, tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)

    def taken(layer: int, *modules: str) -> np.ndarray:
        names = [f"model.layers.{layer}.mlp.experts.{{}}.{module}.weight" for module in modules]
        return np.stack([np.concatenate([tensors.pop(name.format(e)) for name in names]) for e in range(5)])

    for layer in (0, 2):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = taken(layer, "gate_proj", "up_proj")
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = taken(layer, "down_proj")
    save_file(tensors, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "model")).params, model.params)
    tensors["model.layers.0.mlp.experts.down_proj"] = tensors["model.layers.0.mlp.experts.down_proj"][:4]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="expected the matrices of 5 experts"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "6 experts per token, of 5"),
        ({"num_experts": 0}, "num_experts in config.json is 0"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers in config.json is '1'; expected a list of layers"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv in config.json is 8.0, which is not supported"),
    ],
)
def test_wrong_configs(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        DecoderConfig.from_hf({**QWEN, **changes})


def test_every_layer_is_differentiable_and_compiled_once() -> None:
    model = sparse_model({**QWEN, "num_experts_per_tok": 5})  # all: with a choice the logits would jump

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder, params, tokens):
        return jax.grad(lambda p: jnp.sin(decoder.apply({"params": p}, tokens)[0]).sum())(params)

    tokens = random_tokens(48).reshape(2, 24)
    found = gradient(model.decoder, model.params, tokens)
    gradient(model.decoder, model.params, tokens[::-1])
    assert gradient._cache_size() == 1
    # A directional derivative of all parameters at once, by central differences in float32.
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), model.params["layers"])

    def value(size: float) -> float:
        layers = jax.tree.map(lambda leaf, d: leaf + size * d, model.params["layers"], step)
        found = forward({**model.params, "layers": layers}, tokens, decoder=model.decoder)[0]
        return float(np.sin(np.asarray(found, np.float64)).sum())

    slope = sum(float(jnp.vdot(a, b)) for a, b in zip(*map(jax.tree.leaves, (found["layers"], step)), strict=True))
    assert slope == pytest.approx((value(2e-4) - value(-2e-4)) / 4e-4, rel=0.03)
