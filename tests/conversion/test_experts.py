"""Conversion of mixtures of experts: statistics by routing, groups, pruning, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.conversion import convert, prune_neurons
from ngc_jax.conversion import experts as of_experts
from ngc_jax.conversion.output_gradients import measure_output_gradients
from ngc_jax.conversion.pipeline import EXPERTS_TOPOLOGY
from ngc_jax.conversion.state import Calibration
from ngc_jax.conversion.statistics import calibrate
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import token_log_likelihoods
from ngc_jax.groups.topology import expand, parse
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import ROWS, embed, layer_of
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import save_model
from ngc_jax.planning.candidates import candidate_cells
from tests.models.compact import random_params
from tests.tiny import HF_CONFIGS, forward, random_tokens, tiny_tokenizer

QWEN = {
    **HF_CONFIGS["qwen3"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
}
TOKENS = random_tokens(1536)
SETTINGS = {"window": 64, "bos": "never", "gradient_tokens": 512, "propagation_tokens": 512}


def sparse_model(**changes) -> LanguageModel:
    hf_config = {**QWEN, **changes}
    config = DecoderConfig.from_hf(hf_config)
    return LanguageModel("tiny", config, None, random_params(Decoder(config)), hf_config, tiny_tokenizer)


def logits(model: LanguageModel) -> np.ndarray:
    return np.asarray(forward(model.params, TOKENS[None, :64], decoder=model.decoder)[0])


def as_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.fixture
def no_prior(monkeypatch) -> None:
    monkeypatch.setattr(of_experts, "PRIOR_TOKENS", 0.0)


def test_second_moments_are_weighted_by_the_routing(no_prior) -> None:
    model = sparse_model()
    *_, (layer, statistics) = calibrate(model, TOKENS, window=64, bos="never")
    assert layer == 1
    x = embed(model.decoder, model.params, TOKENS.reshape(-1, 64))
    positions = jnp.broadcast_to(jnp.arange(64), x.shape[:2])
    x, _ = layer_of(model.decoder, model.params, 0)(x, positions)
    _, inputs = layer_of(model.decoder, model.params, 1).read(x, positions)
    mlp, x = as_float64(model.params["layers"]["1"]["mlp"]), np.asarray(inputs["mlp_input"], np.float64).reshape(-1, 24)
    scores = np.exp(x @ mlp["router"]["kernel"].T)
    probabilities = scores / scores.sum(-1, keepdims=True)
    chosen = probabilities >= np.sort(probabilities, axis=-1)[:, [-2]]
    weights = np.where(chosen, probabilities, 0.0)
    for expert in range(4):
        p = weights[:, [expert]]
        hidden = silu(x @ mlp["g"]["kernel"][expert].T) * (x @ mlp["u"]["kernel"][expert].T)
        for role, read in (("u", x), ("d", hidden)):
            entry = statistics[f"layers.1.mlp.{role}.{expert}"]
            np.testing.assert_allclose(entry.second_moment, (p * read).T @ (p * read) / len(x), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(entry.absolute_mean, np.abs(p * read).mean(0), rtol=1e-4)
            assert entry.count == chosen[:, expert].sum()
    assert statistics["layers.1.mlp.u.0"].site == statistics["layers.1.mlp.g.0"].site
    assert statistics["layers.1.mlp.u.0"].site != statistics["layers.1.mlp.u.1"].site


def test_gradients_are_those_of_the_experts_outputs(no_prior) -> None:
    """In windows of two tokens only the first has a loss: a weight's gradient is one outer product g x^T."""
    model, tokens = sparse_model(), TOKENS[:24]
    found, _ = measure_output_gradients(model, Calibration(tokens, window=2, batch_size=3))
    positions = jnp.arange(2)[None]

    @jax.jit
    def kernels_of(window):
        def loss(down):
            layers = {**model.params["layers"]}
            layers["1"] = {**layers["1"], "mlp": {**layers["1"]["mlp"], "d": {"kernel": down}}}
            likelihoods, mask = token_log_likelihoods(
                model.decoder, {**model.params, "layers": layers}, window, positions
            )
            return -(likelihoods * mask).sum()

        x, _ = layer_of(model.decoder, model.params, 0)(embed(model.decoder, model.params, window), positions)
        _, inputs = layer_of(model.decoder, model.params, 1).read(x, positions)
        return jax.grad(loss)(model.params["layers"]["1"]["mlp"]["d"]["kernel"]), inputs

    sums, weights = np.zeros((4, 24, 24)), np.zeros(4)
    for window in tokens.reshape(-1, 1, 2):
        kernel_ExMxF, inputs = as_float64(kernels_of(window))
        rows, hidden = inputs[ROWS], inputs["mlp.d_input"]
        for token, expert, weight, h in zip(rows.tokens, rows.experts, rows.weights, hidden, strict=True):
            weights[int(expert)] += weight**2
            if token == 0:
                gradient = kernel_ExMxF[int(expert)] @ h / (h @ h)
                sums[int(expert)] += np.outer(gradient, gradient)
    for expert in range(4):
        entry = found[f"layers.1.mlp.d.{expert}"]
        kernel = np.asarray(model.params["layers"]["1"]["mlp"]["d"]["kernel"][expert], np.float64)
        expected = sums[expert] / weights[expert]
        np.testing.assert_allclose(entry.mean_square, np.diag(expected), rtol=2e-3, atol=1e-7)
        # More outputs than inputs: W^T G W.
        np.testing.assert_allclose(entry.second_moment, kernel.T @ expected @ kernel, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["svd_llm", "ngc"])
def test_one_expert_is_converted_as_a_dense_mlp(method, no_prior) -> None:
    model = sparse_model(num_experts=1, num_experts_per_tok=1, norm_topk_prob=True, moe_intermediate_size=40)
    layers = dict(model.params["layers"])
    layers["1"] = {**layers["1"], "mlp": {role: {"kernel": layers["1"]["mlp"][role]["kernel"][0]} for role in "ugd"}}
    config = DecoderConfig.from_hf({**HF_CONFIGS["qwen3"], "num_hidden_layers": 2})
    dense = dataclasses.replace(model, config=config, params={**model.params, "layers": layers})
    settings = {**SETTINGS, "keep": 0.7, **({} if method == "svd_llm" else {"keep_neurons": 1.0, "propagation": 0.0})}
    found, expected = (convert(one, method, TOKENS, **settings) for one in (model, dense))
    assert [group.rank for group in found.plan.groups] == [group.rank for group in expected.plan.groups]
    np.testing.assert_allclose(logits(found), logits(expected), atol=2e-3)


@pytest.mark.parametrize("topology", ["q-k-v-o-u-g-d", "q-k-v-o-ug-d*", "u*-g*-d", "ug*-d"])
def test_full_rank_is_exact(topology, tmp_path) -> None:
    model = sparse_model()
    compact = convert(model, "svd_llm", TOKENS, keep=None, topology=topology, rank="full", **SETTINGS)
    shared = [group for group in compact.plan.groups if group.name.endswith("*")]
    assert bool(shared) == ("*" in topology)
    assert all(len(group.members) in (4, 8) for group in shared)
    np.testing.assert_allclose(logits(compact), logits(model), atol=1e-4)
    again = load_model(str(save_model(compact, tmp_path / "model")))
    np.testing.assert_array_equal(logits(again), logits(compact))


def test_the_default_method_shares_where_experts_read_the_same_few_directions() -> None:
    """All u read 5 directions of the stream, those of each expert's g are its own."""
    model, rng = sparse_model(), np.random.default_rng(0)
    mlp = dict(model.params["layers"]["1"]["mlp"])
    directions = rng.standard_normal((5, 24))
    mlp["u"] = {"kernel": jnp.asarray(rng.standard_normal((4, 16, 5)) @ directions / 5, jnp.float32)}
    own = rng.standard_normal((4, 16, 5)) @ rng.standard_normal((4, 5, 24)) / 5
    mlp["g"] = {"kernel": jnp.asarray(own, jnp.float32)}
    layers = {**model.params["layers"], "1": {**model.params["layers"]["1"], "mlp": mlp}}
    model = dataclasses.replace(model, params={**model.params, "layers": layers})
    compact = convert(model, "ngc", TOKENS, keep=0.5, keep_neurons=1.0, **SETTINGS)
    names = {group.name.split("-")[1] for group in compact.plan.groups if group.name.startswith("L1")}
    assert "u*" in names
    assert "g*" not in names
    assert {f"g.{expert}" for expert in range(4)} <= names
    assert compact.plan.keep_ratio() <= 0.5
    (shared,) = (group for group in compact.plan.groups if group.name == "L1-u*")
    assert 3 <= shared.rank <= 5


@pytest.mark.parametrize(
    "method", ["svd", "fwsvd", "asvd", "svd_llm_v2", "nystrom", "ngc_paper", "ngc", "ngc_one_sided"]
)
def test_every_method_meets_its_keep_ratio(method, tmp_path) -> None:
    model = sparse_model()
    compact = convert(model, method, TOKENS, keep=0.7, **SETTINGS)
    assert 0.6 < compact.plan.keep_ratio() <= (0.72 if method == "ngc_paper" else 0.7)  # which rounds to nearest
    stored = compact.count_parameters()
    saved = compact.plan.dense_parameters() - compact.plan.count_parameters()
    assert model.count_parameters() - stored == saved  # routers are as they were
    assert np.isfinite(logits(compact)).all()


def test_the_default_method_prunes_factorises_and_propagates() -> None:
    """Beside a dense layer whose G is measured whole because experts are pruned."""
    model = sparse_model(moe_intermediate_size=20)
    compact = convert(model, "ngc", TOKENS, keep=0.7, **SETTINGS)
    assert compact.config.experts.width < 20
    assert 0.69 < compact.plan.keep_ratio() <= 0.7
    assert np.isfinite(logits(compact)).all()


def test_pruning_removes_each_experts_own_silent_neurons(tmp_path) -> None:
    model = sparse_model(moe_intermediate_size=20)
    mlp = dict(model.params["layers"]["1"]["mlp"])
    kernel = np.array(mlp["u"]["kernel"])
    for expert in range(4):
        kernel[expert, np.random.default_rng(expert).permutation(20)[:4]] = 0.0
    layers = {**model.params["layers"]}
    layers["1"] = {**layers["1"], "mlp": {**mlp, "u": {"kernel": jnp.asarray(kernel)}}}
    model = dataclasses.replace(model, params={**model.params, "layers": layers})
    smaller = convert(model, prune_neurons(0.8), TOKENS, keep=0.9, window=64, bos="never")
    assert smaller.config.experts.width == smaller.hf_config["moe_intermediate_size"] == 16
    assert smaller.config.mlp_dim == 40  # the dense layer is left as it is
    np.testing.assert_allclose(logits(smaller), logits(model), atol=1e-4)
    again = load_model(str(save_model(smaller, tmp_path / "model")))
    assert again.config == smaller.config
    np.testing.assert_array_equal(logits(again), logits(smaller))


def test_experts_without_tokens_take_the_layers_average() -> None:
    model = sparse_model()
    layer = model.params["layers"]["1"]
    router = np.zeros((4, 24), np.float32)
    router[0], router[1] = (sign * np.random.default_rng(0).standard_normal(24) for sign in (1, -1))
    # Either of the first two has the greatest logit, and of two equal ones the earlier expert is chosen.
    mlp = {**layer["mlp"], "router": {"kernel": jnp.asarray(router)}}
    layers = {**model.params["layers"], "1": {**layer, "mlp": mlp}}
    model = dataclasses.replace(model, params={**model.params, "layers": layers})
    *_, (_, statistics) = calibrate(model, TOKENS, window=64, bos="never")
    entries = [statistics[f"layers.1.mlp.u.{expert}"] for expert in range(4)]
    assert [entry.count for entry in entries[2:]] == [TOKENS.size, 0]
    total, rarest = sum(entry.second_moment for entry in entries), entries[3].second_moment
    share = np.trace(rarest) / np.trace(total)
    assert 0 < share < 0.01
    np.testing.assert_allclose(rarest, share * total, rtol=1e-6)
    hidden = statistics["layers.1.mlp.d.3"].second_moment
    np.testing.assert_allclose(hidden, hidden[0, 0] * np.eye(16))
    compact = convert(model, "ngc", TOKENS, keep=0.7, **SETTINGS)
    assert np.isfinite(logits(compact)).all()


def test_topologies_of_experts() -> None:
    groups = expand(parse("q-ug-d*"), 2, experts=(0, 2))
    assert [group.name for group in groups] == ["L0-q", "L0-ug", "L0-d", "L1-q", "L1-ug.0", "L1-ug.1", "L1-d*"]
    assert groups[5].members == ("layers.1.mlp.u.1", "layers.1.mlp.g.1")
    assert groups[6].members == ("layers.1.mlp.d.0", "layers.1.mlp.d.1")
    assert [group.name for group in expand(parse("qug*"), 1, experts=(2,))] == ["L0-qug*"]
    for wrong in ("qu", "uu"):
        with pytest.raises(UsageError, match="add '\\*'"):
            expand(parse(wrong), 2, experts=(2, 2))
    with pytest.raises(UsageError, match="unknown role"):
        parse("u*g")
    cells = candidate_cells(DecoderConfig.from_hf(QWEN), EXPERTS_TOPOLOGY)
    choices = [[[group.name for group in way] for way in cell] for cell in cells if len(cell) > 1]
    assert choices == [[[f"L1-{role}.{expert}" for expert in range(4)], [f"L1-{role}*"]] for role in "ug"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "qwen3_moe models cannot be quantised"),
        ({"form": "dense"}, "no errors are propagated in qwen3_moe models"),
        ({"topology": "uu-gg-d"}, "add '\\*'"),
    ],
)
def test_what_is_refused(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        convert(sparse_model(num_hidden_layers=4), "ngc", TOKENS, keep=0.7, **options)
