"""Fused tensors whose parts take turns by head or that are stored transposed, in files as they were published."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.fused import Rows
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.tiny import tiny_model

LAYERS, HEADS, HEAD = 3, 3, 8  # of the tiny GPT-NeoX


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_rows_in_turns():
    tensor = np.arange(2 * 3 * 4 * 5).reshape(24, 5)  # 2 heads of 3 parts of 4 rows
    expected = [tensor[head * 12 + 4 + row] for head in range(2) for row in range(4)]
    np.testing.assert_array_equal(Rows(4, 8, run=4, stride=12).take(tensor), expected)
    np.testing.assert_array_equal(Rows(4, 8, run=4, stride=12, transposed=True).take(tensor.T), expected)
    np.testing.assert_array_equal(Rows(3, 2, transposed=True).take(tensor.T), tensor[3:5])


def test_a_file_of_pythia(tmp_path):
    """Rows by head, masks and frequencies among the tensors, and the rope's settings by their older names."""
    model = tiny_model("gpt_neox")
    directory = save_model(model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    fused = tensors["gpt_neox.layers.1.attention.query_key_value.weight"]
    bias = tensors["gpt_neox.layers.1.attention.query_key_value.bias"]
    own = model.params["layers"]["1"]["attn"]
    for head in range(HEADS):
        for number, role in enumerate("qkv"):
            here, there = slice(head * HEAD, head * HEAD + HEAD), (3 * head + number) * HEAD
            np.testing.assert_array_equal(own[role]["kernel"][here], fused[there : there + HEAD])
            np.testing.assert_array_equal(own[role]["bias"][here], bias[there : there + HEAD])
    for layer in range(LAYERS):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[f"{prefix}bias"] = np.ones((1, 1, 8, 8), np.bool_)
        tensors[f"{prefix}masked_bias"] = np.float32(-1e9)[None]
        tensors[f"{prefix}rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {"rotary_emb_base": 500, "rotary_pct": 0.5}
    config.pop("rope_theta")
    (directory / "config.json").write_text(json.dumps(config))
    again = load_model(str(directory))
    assert_same(again.params, model.params)
    (rope,) = set(again.config.ropes)
    assert (rope.theta, rope.rotated(HEAD)) == (500.0, 4)
    assert again.config.parallel_norms


def test_a_file_of_gpt2(tmp_path):
    """Without a prefix or a head, as published; with masks among the tensors; in 16 bits."""
    model = tiny_model("gpt2")
    directory = save_model(model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    own = model.params["layers"]["2"]
    whole = np.concatenate([np.asarray(own["attn"][role]["kernel"]) for role in "qkv"])
    np.testing.assert_array_equal(tensors["transformer.h.2.attn.c_attn.weight"], whole.T)
    np.testing.assert_array_equal(tensors["transformer.h.2.mlp.c_fc.weight"], np.asarray(own["mlp"]["u"]["kernel"]).T)
    head = tensors.pop("lm_head.weight")
    bare = {name.removeprefix("transformer."): tensor.astype(np.float16) for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float16) for layer in range(LAYERS)}
    save_file(bare, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    again = load_model(str(directory), dtype="float16")
    expected = {name: part for name, part in model.params.items() if name != "unembed"}
    assert_same(again.params, jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16), expected))
    save_file({**bare, "lm_head.weight": head.astype(np.float16)}, directory / "model.safetensors")
    with pytest.raises(UsageError, match=r"ties the head to the embedding, but tensor 'lm_head\.weight' differs"):
        load_model(str(directory))


def test_a_matrix_that_is_not_transposed_is_refused(tmp_path):
    directory = save_model(tiny_model("gpt2"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj.weight"
    save_file({**tensors, name: np.ascontiguousarray(tensors[name].T)}, directory / "model.safetensors")
    with pytest.raises(UsageError, match=rf"'{name}' of .* is \(24, 40\), expected 24 columns"):
        open_source(str(directory))
