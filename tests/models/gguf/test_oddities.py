"""GGUF files that llama.cpp loads although something about them is odd."""

import logging
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf.source import GgufSource
from ngc_jax.models.gguf.tokenizer import tokenizer_from_gguf
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.load import load_from_source
from ngc_jax.models.sources import open_source
from tests.models.gguf.files import LAYERS, D, F, H, K, N, V, gguf_tensors, hf_tensors, metadata, refused, write
from tests.models.gguf.test_tokenizer import PIECES, spm_metadata, to_metadata, trained
from tests.tiny import forward

TOKENS = np.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)


def file_of(path: Path, arch: str = "llama", **changes) -> Path:
    return write(path, arch, gguf_tensors(arch, hf_tensors(arch)), metadata(arch, **changes))


def file_with(path: Path, add) -> Path:
    """A file with a key that `write` cannot express; `add` is given the writer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata("llama").items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_float32(key, value)
    add(writer)
    for name, tensor in gguf_tensors("llama", hf_tensors("llama")).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


ROWS = {"attn_q": N * H, "attn_k": K * H, "attn_v": K * H, "attn_output": D, "ffn_gate": F, "ffn_up": F, "ffn_down": D}


@pytest.mark.parametrize(
    ("arch", "biased", "complete", "model_type"),
    [
        ("llama", ["0.attn_q", "1.attn_v"], ["attn_q", "attn_k", "attn_v"], "qwen2"),
        ("llama", ["1.attn_output"], ["attn_q", "attn_k", "attn_v", "attn_output"], "llama"),
        ("llama", ["2.ffn_down"], ["ffn_gate", "ffn_up", "ffn_down"], "llama"),
        ("qwen2", ["0.attn_k", "0.attn_output"], ["attn_q", "attn_k", "attn_v", "attn_output"], "llama"),
        ("qwen3", ["0.attn_q", "0.attn_k", "0.attn_v"], ["attn_q", "attn_k", "attn_v", "attn_output"], "qwen3"),
        ("gemma3", ["0.attn_q", "2.attn_k"], ["attn_q", "attn_k", "attn_v", "attn_output"], "gemma3_text"),
    ],
)
def test_biases_of_some_blocks_alone_are_those_of_a_file_with_zeros_elsewhere(
    arch, biased, complete, model_type, tmp_path
):
    plain = gguf_tensors(arch, hf_tensors(arch))
    rng = np.random.default_rng(1)
    some = {f"blk.{n}.bias": rng.normal(size=ROWS[n.split(".")[1]]).astype(np.float32) for n in biased}
    zeros = {f"blk.{i}.{part}.bias": np.zeros(ROWS[part], np.float32) for i in range(LAYERS) for part in complete}
    found = []
    for tensors in (plain | some, plain | zeros | some):
        with GgufSource(write(tmp_path / "m.gguf", arch, tensors, metadata(arch))) as source:
            assert source.config["model_type"] == model_type
            model = load_from_source(source)
            assert inspect_model(source).summary()["total_parameters"] == model.count_parameters()
            found.append(model)
    assert found[0].config == found[1].config
    jax.tree.map(np.testing.assert_array_equal, found[0].params, found[1].params)


def test_text_that_is_not_utf8_does_no_harm_where_nobody_needs_it(tmp_path):
    text = b"caf\xe9", gguf.GGUFValueType.STRING
    path = file_with(tmp_path / "m.gguf", lambda writer: writer.add_key_value("general.description", *text))
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
    with pytest.raises(UsageError, match="holds 'adapter' instead of a model"):
        GgufSource(path)


def test_a_file_that_does_not_say_how_text_is_cut_is_read_with_a_warning(caplog):
    keys = to_metadata(trained("gpt-2"), "default")
    tokenizer_from_gguf(keys, "m.gguf")
    assert not caplog.records
    del keys["tokenizer.ggml.pre"]
    with caplog.at_level(logging.WARNING):
        tokenizer_from_gguf(keys, "m.gguf")
    (record,) = caplog.records
    assert "m.gguf: does not say how text is split" in record.getMessage()


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


def test_a_licence_that_is_not_utf8_is_none(tmp_path):
    text = b"caf\xe9", gguf.GGUFValueType.STRING
    path = file_with(tmp_path / "m.gguf", lambda writer: writer.add_key_value("general.license", *text))
    with GgufSource(path) as source:
        assert source.license is None


def test_a_name_with_a_dot_is_kept_whole(tmp_path):
    for name, expected in (("llama-3.2", "llama-3.2"), ("llama-3.2.gguf", "llama-3.2"), ("a.GGUF", "a")):
        with open_source(str(file_of(tmp_path / name))) as source:
            assert source.name == expected


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp: linear unless the file says otherwise
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_factor_alone_scales_linearly(keys, factor, tmp_path):
    with GgufSource(file_of(tmp_path / "m.gguf", **keys)) as source:
        scaling = source.config["rope_scaling"]
    assert scaling == (None if factor is None else {"rope_type": "linear", "factor": factor})


@pytest.mark.parametrize("absent", [-1, 2**32 - 1])
def test_minus_one_is_no_token(absent):
    keys = to_metadata(trained("gpt-2"), "gpt-2", bos_token_id=absent, eos_token_id=absent, padding_token_id=absent)
    tokenizer = tokenizer_from_gguf(keys, "m.gguf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)


@pytest.mark.parametrize(("index", "expected"), [(5, 5), (2**32 - 1, None), (V, None), (True, None), (-1, None)])
def test_ids_in_the_config_are_ids_of_the_vocabulary(index, expected, tmp_path):
    kind = "add_bool" if isinstance(index, bool) else "add_int64"
    key = "tokenizer.ggml.eos_token_id"
    with GgufSource(file_with(tmp_path / "m.gguf", lambda writer: getattr(writer, kind)(key, index))) as source:
        assert source.config["eos_token_id"] == expected
        assert not isinstance(source.config["eos_token_id"], bool)


@pytest.mark.parametrize(("value", "begins"), [(1, True), (0, False), (True, True), (False, False)])
def test_flags_may_be_numbers(value, begins):
    tokenizer = tokenizer_from_gguf(spm_metadata(add_bos_token=value), "m.gguf")
    assert (tokenizer.encode("the", special_tokens=True)[0] == 1) == begins


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token", "add_space_prefix"])
@pytest.mark.parametrize("value", ["false", [0], 0.0])
def test_flags_that_are_neither_are_refused(key, value):
    with refused("m.gguf", key, "true or false"):
        tokenizer_from_gguf(spm_metadata(**{key: value}), "m.gguf")


def test_scores_may_be_whole_numbers_and_not_nan():
    scores = list(range(0, -len(PIECES), -1))
    whole, real = (tokenizer_from_gguf(spm_metadata(scores=s), "m.gguf") for s in (scores, [float(s) for s in scores]))
    assert whole.encode("the cat").tolist() == real.encode("the cat").tolist()
    with refused("scores"):
        tokenizer_from_gguf(spm_metadata(scores=[float("nan")] * len(PIECES)), "m.gguf")


def test_unknown_types_of_tokens_are_warned_of_where_a_chat_needs_them(caplog):
    keys = to_metadata(trained("gpt-2"), "gpt-2", token_type=None)
    tokenizer_from_gguf(keys, "m.gguf")
    assert not caplog.records
    tokenizer_from_gguf(keys | {"tokenizer.chat_template": "{{ messages }}"}, "m.gguf")
    (record,) = caplog.records
    assert "m.gguf: does not say which tokens are special" in record.getMessage()


def test_a_guess_is_said_once(tmp_path, caplog):
    keys = to_metadata(trained("gpt-2"), "default")
    del keys["tokenizer.ggml.pre"]
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["token_embd.weight"] = np.ones((len(keys["tokenizer.ggml.tokens"]), D), np.float32)
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama") | keys)) as source:
        assert source.tokenizer() is source.tokenizer()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF", ""])
def test_parts_are_found_whatever_the_suffix(suffix, tmp_path):
    write(tmp_path / "m.gguf", "llama", gguf_tensors("llama", hf_tensors("llama")), metadata("llama"), split=9)
    parts = [part.rename(part.with_suffix(suffix)) for part in sorted(tmp_path.iterdir())]
    with open_source(str(parts[0])) as source:
        assert len(source.shapes) == len(hf_tensors("llama"))
        assert source.files == tuple(parts)


def test_parts_of_another_split_are_refused(tmp_path):
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    for size in (9, 10):
        (tmp_path / str(size)).mkdir()
        write(tmp_path / str(size) / "m.gguf", "llama", tensors, metadata("llama"), split=size)
    first, second, *_ = sorted((tmp_path / "9").iterdir())
    third = sorted((tmp_path / "10").iterdir())[2]
    second.write_bytes(third.read_bytes())
    with refused(second.name, "split.no 2"):
        GgufSource(first)


def test_tensors_missing_from_parts_are_noticed(tmp_path):
    path = file_of(tmp_path / "m.gguf")
    keys = metadata("llama") | {"split.count": 1, "split.tensors.count": 99}
    write(path, "llama", gguf_tensors("llama", hf_tensors("llama")), keys)
    with refused("m.gguf", "expected 99"):
        GgufSource(path)
