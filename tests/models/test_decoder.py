"""Properties of the decoder, dense and compact; tests/parity compares its numbers with transformers'."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ngc_jax.groups.plan import GroupPlan, Kernel, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.experts import BLOCK_INPUTS
from ngc_jax.models.generate import generate
from ngc_jax.models.layers import INPUT_SITE, RESIDUALS
from ngc_jax.models.load import LanguageModel, parameter_shapes
from ngc_jax.types import Params
from tests.models.compact import compact_model, compact_plan, dense_equivalent, dense_model, fixed_gauge_model
from tests.models.published import PUBLISHED
from tests.tiny import HF_CONFIGS

LENGTH = 11


@partial(jax.jit, static_argnums=0)
def apply(
    decoder: Decoder,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    starts: jax.Array | None = None,
) -> jax.Array:
    return decoder.apply({"params": params}, tokens, positions, starts=starts)[0]


@partial(jax.jit, static_argnums=0)
def block_inputs(decoder: Decoder, params: Params, tokens: jax.Array) -> dict:
    return decoder.apply({"params": params}, tokens, mutable=[BLOCK_INPUTS])[1][BLOCK_INPUTS]["layers"]


def some_tokens(batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 259, (batch, LENGTH)), jnp.int32)


MODELS = [
    pytest.param(dense_model, "llama", id="llama"),
    pytest.param(dense_model, "gemma3", id="gemma3"),
    pytest.param(compact_model, "mistral", id="compact mistral"),
]


@pytest.mark.parametrize(("make", "architecture"), MODELS)
def test_causality_and_windows_by_gradient(make: Callable[..., LanguageModel], architecture: str) -> None:
    """A hidden state depends on its token and on those before it, as far back as the windows reach together."""
    model = make(architecture, sliding_window=4)
    tokens = jnp.arange(LENGTH)[None]  # all different, so that an embedding's gradient is that of one position
    at = LENGTH - 3

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder: Decoder, params: Params) -> jax.Array:
        def summary(embedding: jax.Array) -> jax.Array:
            variables = {"params": {**params, "embed": {"embedding": embedding}}}
            return jnp.sum(jnp.sin(decoder.apply(variables, tokens, method="hidden")[0][0, at]))

        return jax.grad(summary)(params["embed"]["embedding"])

    size = np.abs(gradient(model.decoder, model.params)).max(axis=1)[:LENGTH]
    reach = sum(LENGTH if window is None else window - 1 for window in model.config.windows)
    first = max(0, at - reach)
    assert (first > 0) == (architecture == "mistral")
    assert np.all(size[first : at + 1] > 1e-6)
    assert np.all(size[:first] == 0)
    assert np.all(size[at + 1 :] == 0)


@pytest.mark.parametrize(("make", "architecture"), MODELS)
def test_padding_does_not_matter(make: Callable[..., LanguageModel], architecture: str) -> None:
    """Wherever the padding is, whatever its tokens are; and rows of a batch do not see each other."""
    model = make(architecture)
    tokens, other = some_tokens(), some_tokens(seed=1)
    expected = apply(model.decoder, model.params, tokens)
    index = np.arange(LENGTH)
    right = np.concatenate([index, np.full(4, -1)])
    left = np.concatenate([np.full(4, -1), index])
    padded = jnp.stack([jnp.concatenate([tokens[0], other[0, :4]]), jnp.concatenate([other[1, :4], tokens[1]])])
    logits = apply(model.decoder, model.params, padded, jnp.asarray(np.stack([right, left]), jnp.int32))
    np.testing.assert_allclose(logits[0, :LENGTH], expected[0], atol=2e-5)
    np.testing.assert_allclose(logits[1, 4:], expected[1], atol=2e-5)
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("make", [compact_model, fixed_gauge_model])
@pytest.mark.parametrize("architecture", ["llama_untied", "gemma3"])
def test_compact_model_is_the_dense_model_of_the_weights_it_makes(
    make: Callable[..., LanguageModel], architecture: str
) -> None:
    model = make(architecture)
    dense = dense_equivalent(model)
    logits, expected = (apply(m.decoder, m.params, some_tokens()) for m in (model, dense))
    np.testing.assert_allclose(logits, expected, atol=5e-5 * np.abs(expected).max())
    assert np.std(expected) > 0.1


def test_states_are_shared() -> None:
    """One group's input states move every member, in both layers."""
    model = compact_model()

    def inputs_of_o(input_states: jax.Array) -> jax.Array:
        groups = model.params["groups"]
        params = {**model.params, "groups": {**groups, "0-qkk": {**groups["0-qkk"], "input_states": input_states}}}
        layers = block_inputs(model.decoder, params, some_tokens())
        return jnp.stack([layers[layer]["attn"]["o_input"][0] for layer in ("0", "1")])

    states = model.params["groups"]["0-qkk"]["input_states"]
    moved = np.abs(inputs_of_o(states) - inputs_of_o(1.5 * states)).max(axis=(1, 2, 3))
    assert np.all(moved > 1e-3)


def test_parameter_tree_of_a_dense_model() -> None:
    config = DecoderConfig.from_hf(HF_CONFIGS["gemma3"] | {"num_hidden_layers": 1})
    assert parameter_shapes(Decoder(config)) == {
        "embed.embedding": (259, 24),
        "layers.0.attn.k.kernel": (20, 24),
        "layers.0.attn.k_norm.scale": (10,),
        "layers.0.attn.o.kernel": (24, 40),
        "layers.0.attn.q.kernel": (40, 24),
        "layers.0.attn.q_norm.scale": (10,),
        "layers.0.attn.v.kernel": (20, 24),
        "layers.0.attn_norm.scale": (24,),
        "layers.0.attn_post_norm.scale": (24,),
        "layers.0.mlp.d.kernel": (24, 40),
        "layers.0.mlp.g.kernel": (40, 24),
        "layers.0.mlp.u.kernel": (40, 24),
        "layers.0.mlp_norm.scale": (24,),
        "layers.0.mlp_post_norm.scale": (24,),
        "norm.scale": (24,),
    }


def test_parameter_tree_of_a_compact_model() -> None:
    settings = HF_CONFIGS["llama_untied"] | {"num_hidden_layers": 1, "intermediate_size": 36}
    config = DecoderConfig.from_hf(settings)
    attention = GroupPlan("qk", (config.block(0, "q"), config.block(0, "k")), 5)
    mlp = GroupPlan("ud", (config.block(0, "u"), config.block(0, "d")), 3, Kernel("riemannian", metric_rank=2))
    shapes = parameter_shapes(Decoder(config, Plan((attention, mlp), (config.block(0, "o"),))))
    assert shapes == {
        "embed.embedding": (259, 24),
        "groups.qk.input_states": (24, 5),
        "groups.qk.output_states.layers.0.attn.k": (20, 5),
        "groups.qk.output_states.layers.0.attn.q": (40, 5),
        "groups.ud.input_states": (36, 3),
        "groups.ud.metric.factor": (3, 2),
        "groups.ud.metric.log_diagonal": (3,),
        "groups.ud.output_states.layers.0.mlp.d": (24, 3),
        "groups.ud.output_states.layers.0.mlp.u": (36, 3),
        "layers.0.attn.k.bias": (20,),
        "layers.0.attn.o.bias": (24,),
        "layers.0.attn.o.kernel": (24, 40),
        "layers.0.attn.q.bias": (40,),
        "layers.0.attn.v.bias": (20,),
        "layers.0.attn.v.kernel": (20, 24),
        "layers.0.attn_norm.scale": (24,),
        "layers.0.mlp.d.bias": (24,),
        "layers.0.mlp.g.bias": (36,),
        "layers.0.mlp.g.kernel": (36, 24),
        "layers.0.mlp.u.bias": (36,),
        "layers.0.mlp_norm.scale": (24,),
        "norm.scale": (24,),
        "unembed.kernel": (259, 24),
    }


@pytest.mark.parametrize("architecture", HF_CONFIGS)
def test_a_plan_counts_what_the_model_stores(architecture: str) -> None:
    config = DecoderConfig.from_hf(HF_CONFIGS[architecture])
    plan = compact_plan(config)
    dense, compact = (sum(map(np.prod, parameter_shapes(Decoder(config, p)).values())) for p in (None, plan))
    assert dense - compact == plan.dense_parameters() - plan.count_parameters()


def test_a_plan_counts_what_the_model_stores_in_the_fixed_gauge() -> None:
    model, dense = fixed_gauge_model(), dense_model()
    assert model.plan is not None
    saved = model.plan.dense_parameters() - model.plan.count_parameters()
    assert dense.count_parameters() - model.count_parameters() == saved
    # The group of full rank costs what its members do when dense.
    square = next(group for group in model.plan.groups if group.rank == group.d_in)
    assert square.count_parameters() == square.dense_parameters
    assert model.params["groups"][square.name]["input_states"].shape == (0, square.d_in)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_they_are_said_to(name: str) -> None:
    """Layers are alike: each adds what the second one does. Tracing 80 of them takes seconds."""
    raw, parameters = PUBLISHED[name]
    config = DecoderConfig.from_hf(raw)

    def count(layers: int) -> int:
        experts = config.experts and dataclasses.replace(config.experts, layers=config.experts.layers[:layers])
        part = dataclasses.replace(
            config, num_layers=layers, windows=config.windows[:layers], ropes=config.ropes[:layers], experts=experts
        )
        return sum(int(np.prod(shape)) for shape in parameter_shapes(Decoder(part)).values())

    one, two = count(1), count(2)
    assert one + (config.num_layers - 1) * (two - one) == parameters


def test_full_size_shapes_of_llama_3_70b() -> None:
    raw, _ = PUBLISHED["Llama 3.1 70B"]
    decoder = Decoder(DecoderConfig.from_hf(raw), param_dtype=jnp.bfloat16)
    shapes = parameter_shapes(decoder)
    layers = {shape for name, shape in shapes.items() if name.startswith("layers.79.")}
    assert layers == {(8192,), (8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)}
    assert shapes["embed.embedding"] == shapes["unembed.kernel"] == (128_256, 8192)


def test_recomputing_changes_no_gradient() -> None:
    model = compact_model()

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder: Decoder, params: Params) -> Params:
        return jax.grad(lambda p: jnp.sum(jnp.sin(decoder.apply({"params": p}, some_tokens())[0])))(params)

    plain, recomputed = (
        traverse_util.flatten_dict(gradient(dataclasses.replace(model.decoder, remat=remat), model.params))
        for remat in (False, True)
    )
    for path, expected in plain.items():
        expected = np.asarray(expected)
        np.testing.assert_allclose(recomputed[path], expected, atol=1e-5 * np.abs(expected).max(), err_msg=str(path))
        assert np.any(expected != 0), path


@pytest.mark.parametrize("make", [dense_model, compact_model])
def test_bfloat16(make: Callable[..., LanguageModel]) -> None:
    """Parameters and activations in bfloat16; logits in float32, near those of a float32 model."""
    model = make("gemma3")
    exact = apply(model.decoder, model.params, some_tokens())
    decoder = Decoder(model.config, model.plan, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    logits = apply(decoder, params, some_tokens())
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(block_inputs(decoder, params, some_tokens()))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert np.abs(logits - exact).mean() < 0.05 * np.std(exact)


def at_use(path: tuple[str, ...], leaf: jax.Array, plan: Plan | None) -> jax.Array:
    """A stored parameter as a bfloat16 computation reads it: norms, metrics and tanh features are float32."""
    kernels = {} if plan is None else {group.name: group.kernel.name for group in plan.groups}
    accurate = path[-1] == "scale" or "metric" in path or kernels.get(path[1]) == "lifted"
    return leaf if accurate else leaf.astype(jnp.bfloat16)


@pytest.mark.parametrize("make", [dense_model, compact_model, fixed_gauge_model])
def test_float32_parameters_in_a_bfloat16_computation(make: Callable[..., LanguageModel]) -> None:
    """The same numbers as from parameters that were cast before; float32 gradients; nothing compiles twice."""
    model, tokens = make("qwen2"), some_tokens()
    decoder = Decoder(model.config, model.plan, dtype=jnp.bfloat16)
    assert (decoder.param_dtype, decoder.compute_dtype) == (jnp.float32, jnp.bfloat16)
    flat = traverse_util.flatten_dict(dict(model.params))
    cast = traverse_util.unflatten_dict({path: at_use(path, leaf, model.plan) for path, leaf in flat.items()})
    both = [apply(one, params, tokens) for one, params in ((decoder, model.params), (decoder, cast))]
    np.testing.assert_array_equal(*both)
    assert both[0].dtype == jnp.float32
    inputs = jax.tree.leaves(block_inputs(decoder, model.params, tokens))
    assert inputs
    assert {leaf.dtype for leaf in inputs} == {jnp.dtype(jnp.bfloat16)}
    assert np.any(np.asarray(both[0] != apply(model.decoder, model.params, tokens)))

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder: Decoder, params: Params, tokens: jax.Array) -> Params:
        return jax.grad(lambda p: jnp.sin(decoder.apply({"params": p}, tokens)[0]).sum())(params)

    for seed in range(2):
        gradients = gradient(decoder, model.params, some_tokens(seed=seed))
    assert gradient._cache_size() == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients) if leaf.size)


def test_generation_in_another_type_than_the_parameters() -> None:
    """Step by step and in one pass, a cache and a computation in bfloat16 give the same tokens."""
    model = dataclasses.replace(dense_model(), compute_dtype=jnp.dtype(jnp.bfloat16))
    assert (model.param_dtype, model.dtype, model.decoder.compute_dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    params = jax.eval_shape(model.decoder.init, jax.random.key(0), some_tokens())["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    prompt = np.arange(3, 8)
    (found,) = generate(model, [prompt], max_new_tokens=6)
    row = np.concatenate([prompt, found])[None]
    np.testing.assert_array_equal(apply(model.decoder, model.params, row)[0, 4:-1].argmax(-1), found)


def test_block_inputs_are_sown_where_they_are_said_to_be() -> None:
    model = dense_model()
    inputs = block_inputs(model.decoder, model.params, some_tokens())
    for layer in range(model.config.num_layers):
        for role, site in INPUT_SITE.items():
            node = inputs[str(layer)]
            for name in site.split("."):
                node = node[name]
            (x,) = node
            assert x.shape == (2, LENGTH, model.config.block(layer, role).d_in)


def test_the_soft_cap_bounds_the_logits() -> None:
    model = dense_model("gemma3", final_logit_softcapping=0.5)
    capped = apply(model.decoder, model.params, some_tokens())
    uncapped = dataclasses.replace(model.decoder, config=dataclasses.replace(model.config, logit_soft_cap=None))
    plain = apply(uncapped, model.params, some_tokens())
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), atol=1e-6)
    assert np.abs(plain).max() > 1


def test_no_program_is_compiled_twice() -> None:
    """Decoders are values: an equal one is the same static argument."""
    model = compact_model()
    traced = 0

    @partial(jax.jit, static_argnums=0)
    def run(decoder: Decoder, params: Params, tokens: jax.Array) -> jax.Array:
        nonlocal traced
        traced += 1
        return decoder.apply({"params": params}, tokens, method="embedded")

    for seed in range(3):
        config = DecoderConfig.from_hf(model.hf_config)
        run(Decoder(config, compact_plan(config)), model.params, some_tokens(seed=seed))
    assert traced == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_documents_in_one_row_are_as_if_alone(architecture: str) -> None:
    model = dense_model(architecture)
    tokens = some_tokens()
    cut = 4
    starts = jnp.where(jnp.arange(LENGTH) < cut, 0, cut)[None].repeat(2, 0)
    packed = apply(model.decoder, model.params, tokens, starts=starts)
    for part in (tokens[:, :cut], tokens[:, cut:]):
        alone = apply(model.decoder, model.params, part)
        begin = 0 if part.shape[1] == cut else cut
        np.testing.assert_allclose(packed[:, begin : begin + part.shape[1]], alone, rtol=1e-4, atol=1e-5)


def test_residuals_are_sown() -> None:
    model = dense_model("llama")
    decoder, params, tokens = model.decoder, {"params": model.params}, some_tokens()
    hidden, sown = decoder.apply(params, tokens, method="hidden", mutable=[RESIDUALS])
    outputs = [sown[RESIDUALS]["layers"][str(layer)]["output"][0] for layer in range(model.config.num_layers)]
    np.testing.assert_array_equal(decoder.apply(params, outputs[-1], method="normed"), hidden[0])
    assert not np.allclose(outputs[0], outputs[1])


def test_unrolled_layers_are_the_same_layers_again() -> None:
    model = dense_model("gemma3")
    once = model.config.num_layers
    tied = dataclasses.replace(model.config, iterations=2)
    written_out = dataclasses.replace(
        model.config, num_layers=2 * once, windows=2 * model.config.windows, ropes=2 * model.config.ropes
    )
    layers = model.params["layers"]
    both = {**layers, **{str(once + layer): layers[str(layer)] for layer in range(once)}}
    tokens = some_tokens()
    found = apply(Decoder(tied), model.params, tokens)
    np.testing.assert_allclose(found, apply(Decoder(written_out), {**model.params, "layers": both}, tokens), atol=1e-5)
    assert parameter_shapes(Decoder(tied)) == parameter_shapes(Decoder(model.config))


def test_unrolled_layers_have_a_cache_for_every_iteration() -> None:
    model = dense_model("gemma3")
    unrolled = dataclasses.replace(model, config=dataclasses.replace(model.config, iterations=2))
    prompt = np.arange(1, 8, dtype=np.int32)
    (continued,) = generate(unrolled, [prompt], max_new_tokens=6)
    tokens = prompt
    for _ in range(6):
        padded = np.pad(tokens, (0, 13 - len(tokens)))[None]  # one shape; what comes after does not matter
        logits = apply(Decoder(unrolled.config), unrolled.params, padded)
        tokens = np.append(tokens, np.argmax(logits[0, len(tokens) - 1])).astype(np.int32)
    np.testing.assert_array_equal(continued, tokens[len(prompt) :])
