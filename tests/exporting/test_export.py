"""Exports compute what the model computes: read back by our own readers, of every family and kind of group."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ngc_jax.conversion import chain, convert, quantise
from ngc_jax.errors import UsageError
from ngc_jax.exporting import GGUF_TYPES, export, export_gguf, export_huggingface
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from ngc_jax.models.tokenizer import wrap
from tests.models.compact import compact_model, dense_model
from tests.tiny import forward, random_tokens, tiny_model

TEXT = "Groups of 12345 neurons, naïve ½.\n\n  It's <bos> a group of groups; they've 1998 neurons."
FAMILIES = ["llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma3"]


def bpe_tokenizer():
    """Byte-level BPE with merges, which cuts digits one by one; 300 tokens, the last three special."""
    backend = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT * 3], trainer)
    backend.add_special_tokens(["<bos>", "<eos>", "<|im_end|>"])
    return wrap(
        backend,
        special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"},
        chat_template="{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
        add_bos=True,
    )


def model_of(family, **changes):
    return dataclasses.replace(compact_model(family, vocab_size=300, **changes), load_tokenizer=bpe_tokenizer)


def logits(model):
    return np.asarray(forward(model.params, jnp.asarray(random_tokens(20))[None], decoder=model.decoder)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of a model of every family with groups, by family."""
    place = tmp_path_factory.mktemp("models")
    return {family: (model_of(family), save_model(model_of(family), place / family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_formats_give_the_logits_of_the_groups(saved, family, tmp_path):
    model, directory = saved[family]
    with open_source(str(directory)) as source:
        summary = export_huggingface(source, tmp_path / "hf")
    expected = logits(model)
    exported = load_model(str(tmp_path / "hf"))
    assert exported.plan is None
    assert summary["folded"]
    assert summary["parameters"] == exported.count_parameters()
    np.testing.assert_allclose(logits(exported), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == model.hf_config["model_type"]
    assert "ngc" not in config
    if family != "llama_untied":  # biases on q, k, v and o
        with open_source(str(directory)) as source:
            export_gguf(source, tmp_path / "model.gguf", type="f32")
        again = load_model(str(tmp_path / "model.gguf"))
        window = 7 if family == "mistral" else 20  # llama.cpp knows no window of Mistral's
        np.testing.assert_allclose(logits(again)[:, :window], expected[:, :window], rtol=0, atol=1e-4)
        ours, theirs = model.load_tokenizer(), again.load_tokenizer()
        for special in (False, True):
            assert (
                theirs.encode(TEXT, special_tokens=special).tolist()
                == ours.encode(TEXT, special_tokens=special).tolist()
            )
        assert theirs.decode(ours.encode(TEXT)) == TEXT
        assert theirs.stop_tokens == ours.stop_tokens
        messages = [{"role": "user", "content": "Hi"}]
        assert theirs.apply_chat_template(messages).tolist() == ours.apply_chat_template(messages).tolist()


def test_a_pre_tokenizer_without_a_name_is_refused(saved, tmp_path):
    def whitespace():
        tokenizer = bpe_tokenizer()
        tokenizer._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return tokenizer

    model = dataclasses.replace(saved["llama"][0], load_tokenizer=whitespace)
    with open_source(str(save_model(model, tmp_path / "model"))) as source, pytest.raises(UsageError, match="no name"):
        export_gguf(source, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_what_the_gguf_package_makes_of_the_weights(kind, tmp_path):
    # Rows of o hold 40 numbers, no whole number of blocks of 32; those of all others do.
    model = dense_model("llama", vocab_size=300, hidden_size=64, intermediate_size=96)
    model = dataclasses.replace(model, load_tokenizer=bpe_tokenizer)
    with open_source(str(save_model(model, tmp_path / "model"))) as source:
        summary = export_gguf(source, tmp_path / "model.gguf", type=kind)
    asked = GGUF_TYPES[kind][0]
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert summary["float16_matrices"] == (2 if kind.startswith("q") else 0)
    assert summary["bytes"] == (tmp_path / "model.gguf").stat().st_size
    for name, node, type_ in (
        ("token_embd.weight", model.params["embed"]["embedding"], asked),
        ("blk.1.ffn_down.weight", model.params["layers"]["1"]["mlp"]["d"]["kernel"], asked),
        ("blk.1.attn_output.weight", model.params["layers"]["1"]["attn"]["o"]["kernel"], None),
        ("blk.1.ffn_norm.weight", model.params["layers"]["1"]["mlp_norm"]["scale"], Type.F32),
    ):
        stored = (Type.F16 if kind.startswith("q") else asked) if type_ is None else type_
        assert tensors[name].tensor_type == stored
        expected = dequantize(quantize(np.asarray(node), stored), stored)
        np.testing.assert_array_equal(dequantize(tensors[name].data, stored).reshape(node.shape), expected)


QUANTISED = {
    "symmetric": (quantise(4, feedback=False), Type.Q4_0, Type.Q8_0),
    "offsets": (quantise(4, 32, symmetric=False, feedback=False, embedding_bits=3), Type.Q4_1, Type.Q4_1),
    "3 bits": (quantise(3, feedback=False, embedding_bits=4), Type.Q4_0, Type.Q4_0),
    "8 bits": (quantise(8, 128, feedback=False), Type.Q8_0, Type.Q8_0),
    "no such blocks": (quantise(8, symmetric=False, feedback=False), Type.Q8_0, Type.Q8_0),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_matrices_keep_their_codes(name, tmp_path):
    how, kind, embedding = QUANTISED[name]
    dense = dense_model("llama", vocab_size=300, hidden_size=64, intermediate_size=96)
    model = dataclasses.replace(convert(dense, chain(how)), load_tokenizer=bpe_tokenizer)
    with open_source(str(save_model(model, tmp_path / "model"))) as source:
        summary = export_gguf(source, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert (tensors["blk.0.ffn_up.weight"], tensors["token_embd.weight"]) == (kind, embedding)
    # All but o, whose rows of 40 numbers are no whole blocks.
    assert summary["matrices_with_their_codes"] == (0 if name == "no such blocks" else 2 * 6 + 1)
    again = load_model(str(tmp_path / "model.gguf"))
    for path in (("embed", "embedding"), *(("layers", "1", *block) for block in BLOCKS)):
        exact, found = model.params, again.params
        for part in path:
            exact, found = exact[part], found[part]
        exact, step = np.asarray(exact.dequantise()), np.abs(np.asarray(exact.scales, np.float32)).max()
        # m is rounded to float16, whose last place is 2^-11 of 16 steps at most; q8_0 rounds once more.
        least = {"offsets": step / 64, "no such blocks": 2 * step}.get(name, 0)
        np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=0, atol=least)


BLOCKS = (("attn", "q", "kernel"), ("attn", "k", "kernel"), ("mlp", "d", "kernel"))


def test_numbers_too_large_for_float16_are_refused_and_nothing_is_left(tmp_path):
    model = tiny_model("llama")
    model.params["norm"]["scale"] = model.params["norm"]["scale"].at[0].set(1e6)
    directory = save_model(model, tmp_path / "model")
    with open_source(str(directory)) as source, pytest.raises(UsageError, match="too large for float16"):
        export_huggingface(source, tmp_path / "out", dtype="float16")
    with open_source(str(directory)) as source, pytest.raises(UsageError, match="expected one of f32"):
        export_gguf(source, tmp_path / "m.gguf", type="q3")
    (tmp_path / "m.gguf").write_text("mine")
    with open_source(str(directory)) as source, pytest.raises(UsageError, match="exists"):
        export_gguf(source, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_tensors_are_written_once(tmp_path):
    with open_source(str(save_model(tiny_model("llama"), tmp_path / "model"))) as source:
        export_huggingface(source, tmp_path / "hf")
    names = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in names  # tied


def test_one_function_for_all(saved, tmp_path):
    model, directory = saved["llama"]
    for to, options in (("hf", {"dtype": "float16"}), ("gguf", {"type": "q8_0"}), ("hf-grouped", {})):
        by_model, by_name = (
            export(what, tmp_path / f"{to}-{n}", to=to, **options) for n, what in enumerate((model, directory))
        )
        assert {**by_model, "out": ""} == {**by_name, "out": ""}
        assert by_name["folded"] is (to != "hf-grouped")
    for to, options, words in (
        ("gguf-grouped", {}, "convert in form dense"),
        ("onnx", {}, "expected one of hf, hf-grouped, gguf"),
        ("gguf", {"dtype": "float16"}, "has no option 'dtype'; expected overwrite, progress, type"),
    ):
        with pytest.raises(UsageError, match=words):
            export(directory, tmp_path / "no", to=to, **options)
    assert not (tmp_path / "no").exists()
