"""Quantised conversions: what they compute, store and refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ngc_jax.conversion import Recipe, chain, convert, factorise, prune_neurons, quantise
from ngc_jax.conversion.quantising import quantise_states
from ngc_jax.conversion.rounding import Grid, round_to_nearest, round_with_feedback
from ngc_jax.errors import UsageError
from ngc_jax.exporting import export_huggingface
from ngc_jax.groups.gauge import free_gauge
from ngc_jax.groups.plan import Block, GroupPlan
from ngc_jax.groups.quantised import is_quantised
from ngc_jax.models.generate import generate
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.load import load_model
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.save import save_model, tensor_bytes
from ngc_jax.models.sources import open_source
from ngc_jax.training.fit import prepare
from tests.conversion.test_rounding import correlated
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(600)
GROUPED = (factorise("ngc", allocation="loss", gauge=True),)


def logits(model, tokens=TOKENS[:30]):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def made(*passes, architecture="llama", **options):
    return convert(tiny_model(architecture), chain(*passes), TOKENS, window=60, batch_size=2, bos="never", **options)


def error(model, other):
    return float(np.abs(logits(model) - logits(other)).mean() / np.abs(logits(other)).mean())


@pytest.mark.parametrize("passes", [(), GROUPED, (factorise("svd_llm"),), (prune_neurons(0.6),)], ids=len)
def test_eight_bits_compute_nearly_what_the_model_does(passes):
    # A chain of no pass is the dense model.
    before = made(*passes) if passes else tiny_model()
    assert error(made(*passes, quantise(8)), before) < 0.05
    assert error(made(*passes, quantise(8)), before) < error(made(*passes, quantise(3)), before)


def test_a_quantised_model_is_saved_and_read_bit_for_bit(tmp_path):
    model = made(*GROUPED, quantise(3, symmetric=False, embedding_bits=4), architecture="llama_untied")
    save_model(model, tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert again.quantised
    for one, other in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(logits(model), logits(again))
    assert again.count_parameters() == model.count_parameters()
    with open_source(str(tmp_path / "out")) as source:
        summary = inspect_model(source).summary()
    assert summary["stored_parameters"] == model.plan.count_parameters()
    assert summary["bytes"] == sum(leaf.nbytes for leaf in model.leaves())
    assert summary["bytes"] < tensor_bytes(tmp_path / "out") < summary["bytes"] + 50_000  # the header


def test_only_ngc_jax_takes_it_for_a_model(tmp_path):
    save_model(made(quantise(8)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "ngc"
    assert config["architectures"] == ["NgcForCausalLM"]
    assert config["ngc"]["format"] == 3
    assert config["ngc"]["quantised"]["model.layers.0.mlp.down_proj.weight"] == {
        "bits": 8,
        "group_size": 64,
        "shape": [24, 40],
        "axis": 1,
    }
    assert "Only ngc-jax loads it" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("passes", [(), GROUPED], ids=len)
def test_export_dequantises(passes, tmp_path):
    model = made(*passes, quantise(4))
    save_model(model, tmp_path / "out")
    with open_source(str(tmp_path / "out")) as source:
        export_huggingface(source, tmp_path / "plain", dtype="float32")
    plain = load_model(str(tmp_path / "plain"))
    assert not plain.quantised
    assert plain.plan is None
    np.testing.assert_allclose(logits(plain), logits(model), atol=2e-4)


def test_cached_generation_is_that_of_the_dequantised_model():
    model = made(*GROUPED, quantise(4, group_size=32))
    floating = jax.tree.map(
        lambda leaf: leaf.dequantise() if is_quantised(leaf) else leaf, model.params, is_leaf=is_quantised
    )
    settings = {"max_new_tokens": 8, "sampling": Sampling(), "key": jax.random.key(0), "stop_tokens": ()}
    ours = generate(model, [TOKENS[:9]], **settings)
    np.testing.assert_array_equal(ours, generate(dataclasses.replace(model, params=floating), [TOKENS[:9]], **settings))


def group_of(d_in=50, rank=12, pivots=tuple(range(0, 36, 3))):
    return GroupPlan("g", (Block("layers.0.attn.q", 20, d_in), Block("layers.0.attn.k", 9, d_in)), rank, pivots=pivots)


def final_hidden_states(model):
    """As the unembedding reads them, from windows of 60 tokens as in calibration."""
    h, _ = model.decoder.apply({"params": model.params}, TOKENS.reshape(-1, 60), method="hidden")
    return np.asarray(h, np.float64).reshape(len(TOKENS), -1)


@pytest.mark.parametrize("architecture", ["llama", "llama_untied"])
def test_the_unembedding_is_rounded_in_the_geometry_of_what_it_reads(architecture):
    model = tiny_model(architecture)
    h = final_hidden_states(model)
    moment, grid = h.T @ h / len(h), Grid(3, 64, True)
    tables = {name: np.asarray(table) for name, table in tables_of(model).items()}
    small = tables_of(made(quantise(8, embedding_bits=3), architecture=architecture))
    if model.config.tied_embeddings:
        moment += 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment))
        expected = {"embed": round_with_feedback(tables["embed"], moment, grid)}
    else:
        expected = {
            "embed": round_to_nearest(tables["embed"], grid, search=True),
            "unembed": round_with_feedback(tables["unembed"], moment, grid),
        }
    assert small.keys() == expected.keys()
    for name, matrix in expected.items():
        # A rounding error of the moment may move a number that lies between two codes.
        assert np.mean(np.asarray(matrix.codes) == np.asarray(small[name].codes)) > 0.98
    last = list(expected)[-1]
    nearest = np.asarray(round_to_nearest(tables[last], grid, search=True).dequantise()) - tables[last]
    error = np.asarray(small[last].dequantise()) - tables[last]
    assert np.square(h @ error.T).sum() < np.square(h @ nearest.T).sum()


def tables_of(model):
    leaves = {"embed": "embedding", "unembed": "kernel"}
    return {name: model.params[name][leaf] for name, leaf in leaves.items() if name in model.params}


@pytest.mark.parametrize("fixed", [True, False])
def test_output_states_are_fitted_to_the_rounded_signal(fixed):
    generator, moment, grid = np.random.default_rng(0), correlated(50), Grid(3, 32, True)
    group = group_of(pivots=group_of().pivots if fixed else None)
    outputs = {member.name: generator.standard_normal((member.d_out, 12)) for member in group.members}
    q_in = generator.standard_normal((38 if fixed else 50, 12))
    # In the free gauge the lengths of latent dimensions are arbitrary; they must not matter.
    q_in, outputs = (
        (q_in, outputs)
        if fixed
        else (q_in * 10.0 ** np.arange(-6, 6), {n: q / 10.0 ** np.arange(-6, 6) for n, q in outputs.items()})
    )
    states = {"input_states": q_in, "output_states": outputs}

    def whole(inputs):
        return free_gauge(group.pivots, inputs, 50) if fixed else inputs

    def loss(small):
        rounded = whole(np.asarray(small["input_states"].dequantise(), np.float64))
        total = 0.0
        for name, exact in outputs.items():
            change = np.asarray(small["output_states"][name].dequantise()) @ rounded.T - exact @ whole(q_in).T
            total += np.einsum("ji,ik,jk->", change, moment, change)
        return total

    ours = quantise_states(group, states, [moment, moment], grid)
    if fixed:
        others = np.setdiff1d(np.arange(50), group.pivots)
        apart = {
            "input_states": round_with_feedback(q_in, moment[np.ix_(others, others)], grid, axis=0),
            "output_states": {
                name: round_with_feedback(exact, whole(q_in).T @ moment @ whole(q_in), grid)
                for name, exact in outputs.items()
            },
        }
        assert loss(ours) < 0.9 * loss(apart)
    nearest = {
        "input_states": round_to_nearest(q_in, grid, axis=0),
        "output_states": {name: round_to_nearest(exact, grid) for name, exact in outputs.items()},
    }
    assert loss(ours) < 0.5 * loss(nearest)


def test_refused():
    for options, message in (
        ({"bits": 5}, "bits 5 is not supported; expected 2, 3, 4 or 8"),
        ({"group_size": 48}, "group-size 48"),
        ({"embedding_bits": 16}, "embedding-bits 16"),
    ):
        with pytest.raises(UsageError, match=message):
            quantise(**options)
    with pytest.raises(UsageError, match="symmetric is an option of quantisation; add bits"):
        Recipe("dense", symmetric=False)
    small = made(quantise(4, feedback=False))
    with pytest.raises(UsageError, match="compact model already"):
        convert(small, "svd", keep=0.8)
    with pytest.raises(UsageError, match="is quantised and cannot be trained"):
        prepare(small, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(bits=5), "which this ngc-jax does not read"),
        (lambda entry: entry.pop("shape"), "which this ngc-jax does not read"),
        (lambda entry: entry.update(shape=[24, 48]), "expected U8"),
        (lambda entry: entry.update(bits=8), "expected I8"),
    ],
)
def test_a_damaged_description_is_an_error(change, message, tmp_path):
    save_model(made(quantise(4, feedback=False)), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    change(config["ngc"]["quantised"]["model.layers.0.mlp.down_proj.weight"])
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        load_model(str(tmp_path / "out"))
