"""GGUF files that llama.cpp loads although something about them is odd."""

import logging
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf_source import GgufSource
from ngc_jax.models.gguf_tokenizer import tokenizer_from_gguf
from ngc_jax.models.load import load_from_source
from ngc_jax.models.sources import open_source
from tests.models.gguf_files import LAYERS, D, H, K, N, V, gguf_tensors, hf_tensors, metadata, write
from tests.models.test_gguf_tokenizer import to_metadata, trained
from tests.tiny import forward

TOKENS = np.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)


def file_of(path: Path, arch: str = "llama", **changes) -> Path:
    return write(path, arch, gguf_tensors(arch, hf_tensors(arch)), metadata(arch, **changes))


def logits(model):
    return np.asarray(forward(model.params, jnp.asarray(TOKENS), decoder=model.decoder)[0])


@pytest.mark.parametrize("name", ["UPPER.GGUF", "sha256-0123", "model"])
def test_a_file_is_known_by_its_first_bytes(name, tmp_path):
    file_of(tmp_path / name)
    with open_source(str(tmp_path / name)) as source:
        assert source.config["model_type"] == "llama"
    (tmp_path / "other").write_bytes(b"GGML and so on")
    with pytest.raises(UsageError, match="not a GGUF file"):
        open_source(str(tmp_path / "other"))


def test_biases_on_q_k_and_v_alone(tmp_path):
    hf = hf_tensors("llama", biases=True)
    path = write(tmp_path / "m.gguf", "llama", gguf_tensors("llama", hf), metadata("llama"))
    with GgufSource(path) as source:
        model = load_from_source(source)
    assert (model.config.qkv_bias, model.config.o_bias) == (True, False)
    bias = np.asarray(model.params["layers"]["1"]["attn"]["k"]["bias"])
    np.testing.assert_array_equal(bias, hf["model.layers.1.self_attn.k_proj.bias"])
    plain = write(tmp_path / "plain.gguf", "llama", gguf_tensors("llama", hf_tensors("llama")), metadata("llama"))
    with GgufSource(plain) as source:
        assert np.abs(logits(load_from_source(source)) - logits(model)).max() > 0.1


def test_text_that_is_not_utf8_does_no_harm_where_nobody_needs_it(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata("llama").items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_float32(key, value)
    writer.add_key_value("general.description", b"caf\xe9", gguf.GGUFValueType.STRING)
    for name, tensor in gguf_tensors("llama", hf_tensors("llama")).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufSource(path) as source:
        assert source.shapes["model.embed_tokens.weight"] == (V, D)


@pytest.mark.parametrize("key", ["tokens", "merges"])
def test_text_that_is_not_utf8_is_refused_where_it_is_needed(key):
    keys = to_metadata(trained("gpt-2"), "gpt-2")
    keys[f"tokenizer.ggml.{key}"][7] = "caf\udce9"
    with pytest.raises(UsageError, match=f"tokenizer.ggml.{key} has a text that is not UTF-8"):
        tokenizer_from_gguf(keys, "m.gguf")


def test_yarn_without_its_original_length_takes_the_files(tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    with GgufSource(file_of(tmp_path / "without.gguf", **yarn)) as source:
        without = load_from_source(source).config.ropes[0]
    said = yarn | {"rope.scaling.original_context_length": 128}
    with GgufSource(file_of(tmp_path / "with.gguf", **said)) as source:
        assert without == load_from_source(source).config.ropes[0]
    assert (without.rope_type, without.original_length) == ("yarn", 128)


def test_rotary_factors_that_old_files_repeat_are_not_left_over(tmp_path):
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors |= {f"blk.{layer}.attn_rot_embd": np.ones(H // 2, np.float32) for layer in range(LAYERS)}
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama"))) as source:
        load_from_source(source)


def test_an_adapter_is_no_model(tmp_path):
    lora = {"blk.0.attn_q.weight.lora_a": np.ones((4, D), np.float32), "x.lora_b": np.ones((N * H + K, 4), np.float32)}
    path = write(tmp_path / "m.gguf", "llama", lora, metadata("llama") | {"general.type": "adapter"})
    with pytest.raises(UsageError, match="holds no model but 'adapter'"):
        GgufSource(path)


def test_a_file_that_does_not_say_how_text_is_cut_is_read_with_a_warning(caplog):
    keys = to_metadata(trained("gpt-2"), "default")
    tokenizer_from_gguf(keys, "m.gguf")
    assert not caplog.records
    del keys["tokenizer.ggml.pre"]
    with caplog.at_level(logging.WARNING):
        tokenizer_from_gguf(keys, "m.gguf")
    (record,) = caplog.records
    assert "m.gguf: does not say how text is cut" in record.getMessage()


def test_more_tokens_than_rows_of_the_embedding(tmp_path):
    keys = metadata("llama") | to_metadata(trained("gpt-2"), "gpt-2")
    path = write(tmp_path / "m.gguf", "llama", gguf_tensors("llama", hf_tensors("llama")), keys)
    with GgufSource(path) as source:
        count = len(keys["tokenizer.ggml.tokens"])
        with pytest.raises(UsageError, match=f"has {count} tokens, its embedding {V} rows"):
            source.tokenizer()


def test_the_licence_goes_along(tmp_path):
    keys = metadata("llama") | {"general.license": "apache-2.0"}
    path = write(tmp_path / "m.gguf", "llama", gguf_tensors("llama", hf_tensors("llama")), keys)
    with GgufSource(path) as source:
        model = load_from_source(source)
    assert model.license == "apache-2.0"
