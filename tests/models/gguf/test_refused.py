"""GGUF files and settings that cannot be read are refused in one line that says why."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf.file import GgufFile
from ngc_jax.models.gguf.source import GgufSource
from tests.models.gguf.files import (
    D,
    H,
    K,
    N,
    gguf_tensors,
    hf_tensors,
    make,
    metadata,
    refused,
    write,
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"expert_count": 8}, ["llama.expert_count", "mixtures"]),
        ({"rope.dimension_count": 16}, ["rope.dimension_count", "head size 24"]),
        ({"attention.value_length": 16}, ["attention.value_length"]),
        ({"attention.key_length": 23}, ["attention.key_length", "even"]),
        ({"attention.head_count": [3, 4]}, ["attention.head_count", "[3, 4]"]),
        ({"attention.head_count": "three"}, ["attention.head_count", "'three'"]),
        ({"attention.layer_norm_rms_epsilon": -1.0}, ["epsilon", "positive"]),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, ["epsilon", "nan"]),
        ({"rope.scaling.type": "longrope"}, ["rope.scaling.type", "longrope", "yarn"]),
        ({"block_count": 4}, ["block_count", "last layer"]),
        ({"block_count": 0}, ["block_count", "0"]),
    ],
)
def test_settings_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with refused("m.gguf", *parts):
        GgufSource(make(tmp_path / "m.gguf", **changes))


def test_a_list_of_equal_head_counts_is_one_number(tmp_path: Path) -> None:
    with GgufSource(make(tmp_path / "m.gguf", **{"attention.head_count": [N, N]})) as source:
        assert source.config["num_attention_heads"] == N


OPTIONAL = ("key_length", "value_length", "head_count_kv", "dimension_count")


@pytest.mark.parametrize(
    "key",
    [
        key
        for key in metadata("gemma3")
        if ("length" in key or "count" in key or "window" in key) and not key.endswith(OPTIONAL)
    ],
)
def test_metadata_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    keys = metadata("gemma3")
    del keys[key]
    path = write(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3", hf_tensors("gemma3")), keys)
    with refused(key, "missing"):
        GgufSource(path)


def test_other_architectures_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with refused("'qwen2moe'", "did you mean qwen2?"):
        GgufSource(write(tmp_path / "m.gguf", "qwen2moe", {"t.weight": np.ones((4, 4), np.float32)}, {}))


def test_embeddings_are_required(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    del tensors["token_embd.weight"]
    with refused("token_embd.weight"):
        GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama")))


def test_types_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in metadata("llama").items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, tensor in gguf_tensors("llama", hf_tensors("llama")).items():
        writer.add_tensor(name, tensor)
    writer.add_tensor("blk.0.odd.weight", np.arange(6, dtype=np.int32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with refused("'blk.0.odd.weight'", "I32", "requantise"):
        GgufSource(tmp_path / "m.gguf")


def test_rows_that_do_not_fit_the_heads(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["blk.0.attn_k.weight"] = np.ones((K * H + 2, D), np.float32)
    with GgufSource(write(tmp_path / "m.gguf", "llama", tensors, metadata("llama"))) as source, refused("50 rows"):
        source.read("model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["not a GGUF file"]),
        (b"GG", ["not a GGUF file"]),
        (b"PK\x03\x04 a zip file", ["not a GGUF file"]),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), ["version 1"]),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), ["big-endian"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), ["truncated"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), ["truncated"]),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), ["truncated"]),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), ["unknown type 99"]),
        # A list of 2^60 numbers; lists within lists without end.
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), ["truncated"]),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000, ["unknown type"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIB", 1, b"k", 0, 5) * 2, ["'k' occurs twice"]),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), ["9 dimensions"]),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 4, 77, 0), ["unknown type number 77"]),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 8, 0), ["Q8_0 blocks"]),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), ["F32 blocks"]),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**62, 0, 0), ["truncated", "'t'"]),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with refused("bad.gguf", *parts):
        GgufFile(tmp_path / "bad.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = hf_tensors("llama")
    keys = metadata("llama") | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    path = write(tmp_path_factory.mktemp("whole") / "m.gguf", "llama", gguf_tensors("llama", hf), keys, kind="Q8_0")
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_any_truncation_is_told(whole: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    content = whole.read_bytes()
    # The last tensor ends less than one alignment before the end of the file.
    path.write_bytes(content[: int(share * (len(content) - 32))])
    with refused("cut.gguf"):
        GgufSource(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_corruption_of_the_header_is_told_or_harmless(
    whole: Path, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    changed = bytearray(whole.read_bytes())
    header = changed.index(b"output_norm.weight") + 60
    for position, byte in changes:
        changed[position % header] = byte
    path = tmp_path / "odd.gguf"
    path.write_bytes(changed)
    with suppress(UsageError), GgufSource(path) as source, np.errstate(all="ignore"):
        source.tokenizer()
        for name in source.shapes:
            assert source.read(name).shape == source.shapes[name]


def test_a_file_that_shrinks_while_open(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.read_bytes())
    with GgufSource(path) as source:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 4)
        with refused("ends inside tensor"):
            for name in source.shapes:
                source.read(name)
