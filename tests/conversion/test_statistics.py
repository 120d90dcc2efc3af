import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.conversion import Calibration
from ngc_jax.conversion.statistics import calibrate
from ngc_jax.errors import UsageError
from ngc_jax.models.experts import BLOCK_INPUTS
from ngc_jax.models.layerwise import Compensated, layer_module, stack_batches
from ngc_jax.text import split_windows
from tests.tiny import HF_CONFIGS, random_tokens, tiny_model


def block_inputs(model, tokens):
    """Inputs of every block from one plain forward pass over a single window, (T, d_in) float64 by block."""
    _, sown = model.decoder.apply({"params": model.params}, tokens[None], mutable=[BLOCK_INPUTS])
    inputs = {}
    for layer, values in sown[BLOCK_INPUTS]["layers"].items():
        sites = {
            "attn.q": values["attn_input"],
            "attn.k": values["attn_input"],
            "attn.v": values["attn_input"],
            "attn.o": values["attn"]["o_input"],
            "mlp.u": values["mlp_input"],
            "mlp.g": values["mlp_input"],
            "mlp.d": values["mlp"]["d_input"],
        }
        for role, (value,) in sites.items():
            if role[-1] not in model.config.roles:
                continue
            inputs[f"layers.{layer}.{role}"] = np.asarray(value[0], np.float64)
    return inputs


@pytest.mark.parametrize("architecture", HF_CONFIGS)
def test_statistics_are_those_of_a_plain_forward_pass(architecture):
    model = tiny_model(architecture)
    tokens = random_tokens(50)
    expected = block_inputs(model, tokens)
    measured = {}
    for _, statistics in calibrate(model, Calibration(tokens, window=50, batch_size=1)):
        measured |= statistics
    assert measured.keys() == expected.keys() == {block.name for block in model.config.blocks()}
    for name, x in expected.items():
        assert measured[name].count == 50
        np.testing.assert_allclose(measured[name].second_moment, x.T @ x / 50, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(measured[name].absolute_mean, np.abs(x).mean(0), rtol=1e-4, atol=1e-6)


def test_batch_size_and_padding_do_not_matter():
    model = tiny_model("gemma3")
    tokens = random_tokens(105)
    results = []
    # Six windows of 20, the last of which is short: 4 leaves empty rows, and 1 a stack that is half empty.
    for batch_size in (1, 2, 4):
        stream = calibrate(model, Calibration(tokens, window=20, batch_size=batch_size))
        results.append({name: s.second_moment for _, statistics in stream for name, s in statistics.items()})
    for name, expected in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[name], expected, rtol=1e-4, atol=1e-5)


@given(count=st.integers(1, 60), window=st.integers(1, 9), batch_size=st.integers(1, 3), per_call=st.integers(1, 5))
def test_stacks_hold_every_token_once_and_in_order(count, window, batch_size, per_call):
    tokens = np.arange(count, dtype=np.int32)
    stacks = stack_batches(tokens, window, batch_size, per_call)
    assert len({stack.tokens.shape for stack in stacks}) == 1
    found = [np.asarray(stack.tokens)[np.asarray(stack.positions) >= 0] for stack in stacks]
    np.testing.assert_array_equal(np.concatenate(found), tokens)
    for stack in stacks:
        is_token = np.asarray(stack.positions) >= 0
        assert is_token[: stack.used()].any(axis=(1, 2)).all()
        assert not is_token[stack.used() :].any()
        mask = np.ones(is_token.shape) if stack.mask is None else np.asarray(stack.mask)
        np.testing.assert_array_equal(mask[: stack.used()], is_token[: stack.used()])


def test_blocks_with_one_input_share_their_statistics():
    model = tiny_model()
    (_, statistics), *_ = calibrate(model, Calibration(random_tokens(20)))
    assert statistics["layers.0.attn.q"] is statistics["layers.0.attn.v"]
    assert statistics["layers.0.mlp.u"] is statistics["layers.0.mlp.g"]
    assert statistics["layers.0.attn.q"] is not statistics["layers.0.mlp.u"]


@pytest.mark.parametrize(("architecture", "kinds"), [("llama", [0, 0, 0]), ("gemma3", [0, 1, 0])])
def test_layers_of_one_kind_share_a_compiled_function(architecture, kinds):
    decoder = tiny_model(architecture).decoder
    modules = [layer_module(decoder, layer) for layer in range(3)]
    assert modules == [modules[kind] for kind in kinds]
    assert len(set(modules)) == len(set(kinds))


def test_compensated_sum_keeps_what_float32_loses():
    @jax.jit
    def run(values):
        zero = jnp.zeros(())
        return jax.lax.scan(lambda s, x: (s.add(x), None), Compensated(zero, zero), values)[0]

    values = np.concatenate([[1e8], np.full(10_000, 0.3, np.float32)]).astype(np.float32)
    exact = values.astype(np.float64).sum()
    assert float(run(values).value()) == pytest.approx(exact, rel=1e-8)
    assert float(jax.lax.scan(lambda s, x: (s + x, None), jnp.float32(0), values)[0]) != pytest.approx(exact, rel=1e-6)


@given(st.integers(1, 200), st.integers(2, 40), st.integers(1, 5))
def test_windows_hold_every_token_once_and_in_order(count, window, batch_size):
    tokens = np.arange(1, count + 1, dtype=np.int32)
    batches = split_windows(tokens, window, batch_size)
    width = min(window, count)
    assert {batch.shape for batch, _ in batches} == {(batch_size, width)}
    rows = [row[positions >= 0] for b, p in batches for row, positions in zip(b, p, strict=True)]
    np.testing.assert_array_equal(np.concatenate(rows), tokens)
    for _, positions in batches:
        for row in positions:
            real = row[row >= 0]
            np.testing.assert_array_equal(real, np.arange(len(real)))


def test_errors():
    model = tiny_model()
    with pytest.raises(UsageError, match="no tokens"):
        list(calibrate(model, Calibration(np.zeros(0, np.int32))))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model.params)
    with pytest.raises(UsageError, match=r"layer 0 .* not finite"):
        list(calibrate(dataclasses.replace(model, params=broken), Calibration(random_tokens(8))))
