"""Model directories, against the safetensors package's own writer."""

import json
import struct
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.safetensors_source import SafetensorsSource

CONFIG = {"model_type": "llama", "hidden_size": 5, "strange": [1, None]}
DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32", "uint8", "bool"]


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (3, 5), "b.weight": (7,), "c": (2, 3, 4), "d": ()}
    if not np.issubdtype(dtype, np.floating) and np.dtype(dtype).kind in "iub":  # weights are never integers
        shapes = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    return {name: np.asarray(4 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def model_directory(path: Path, files: Mapping[str, Mapping[str, np.ndarray]], *, index: bool = False) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        save_file(dict(content), path / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, content in files.items() for tensor in content}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expects a UsageError of one line that says all of `parts`."""
    with pytest.raises(UsageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    expected = tensors(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    with SafetensorsSource(model_directory(tmp_path / "m", {"model.safetensors": expected})) as source:
        assert source.config == CONFIG
        assert source.name == "m"
        assert dict(source.shapes) == {name: tensor.shape for name, tensor in expected.items()}
        for name, tensor in expected.items():
            found = source.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert found.tobytes() == tensor.tobytes()
        with refused("'nothing'"):
            source.read("nothing")


def test_shards_are_one_model(tmp_path: Path) -> None:
    everything = tensors(np.float16)
    shards = [dict(list(everything.items())[part::2]) for part in range(2)]
    files = {f"model-0000{part + 1}-of-00002.safetensors": shard for part, shard in enumerate(shards)}
    directory = model_directory(tmp_path / "m", files, index=True)
    # A copy in another layout lies there too, as some publishers do: the index decides.
    save_file(everything, directory / "consolidated.safetensors")
    with SafetensorsSource(directory, name="org/model") as source:
        assert source.name == "org/model"
        assert set(source.shapes) == set(everything)
        assert source.nbytes == sum(tensor.nbytes for tensor in everything.values())
        for name, tensor in everything.items():
            np.testing.assert_array_equal(source.read(name), tensor)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with refused("index.json", "1 file(s)", "model-00002-of-00002.safetensors"):
        SafetensorsSource(directory)


def test_config_and_shapes_outlive_the_files(tmp_path: Path) -> None:
    source = SafetensorsSource(model_directory(tmp_path / "m", {"model.safetensors": tensors()}))
    source.close()
    assert source.shapes["a.weight"] == (3, 5)
    with refused("has no tokenizer", "tokenizer.json"):
        source.tokenizer()


def test_reading_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    big = {f"t{i}": np.ones((1024, 2048), np.float32) for i in range(4)}
    directory = model_directory(tmp_path / "m", {"model.safetensors": big})
    tracemalloc.start()
    try:
        with SafetensorsSource(directory) as source:
            _, opened = tracemalloc.get_traced_memory()
            for name in big:
                source.read(name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert opened < 1 << 20
    assert peak < 1.1 * big["t0"].nbytes


def test_unknown_dtypes_matter_only_when_read(tmp_path: Path) -> None:
    header = {"t": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    raw = json.dumps(header).encode()
    directory = model_directory(tmp_path / "m", {})
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(2))
    with SafetensorsSource(directory) as source:
        assert source.shapes == {"t": (4,)}
        with refused("'t'", "F4", "BF16"):
            source.read("t")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["config.json"]),
        (lambda path: (path / "m.gguf").touch(), ["config.json", "m.gguf"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda path: (path / "config.json").write_text("[1]"), ["config.json", "not hold a JSON object"]),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "JSON"]),
        (lambda path: (path / "config.json").mkdir(), ["config.json"]),
    ],
)
def test_directories_without_a_config(tmp_path: Path, make: Any, parts: list[str]) -> None:
    make(tmp_path)
    with refused(*parts):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["no weights", "model.safetensors"]),
        (["pytorch_model.bin"], ["pickle", "convert to safetensors"]),
        (["consolidated.00.pth"], ["pickle", "convert to safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["2 safetensors files", "index"]),
    ],
)
def test_directories_without_weights(tmp_path: Path, names: list[str], parts: list[str]) -> None:
    directory = model_directory(tmp_path / "m", {})
    for name in names:
        (directory / name).touch()
    with refused(*parts):
        SafetensorsSource(directory)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_damaged_indices(tmp_path: Path, index: str) -> None:
    directory = model_directory(tmp_path / "m", {"model-00001-of-00001.safetensors": tensors()})
    (directory / "model.safetensors.index.json").write_text(index)
    with refused("model.safetensors.index.json"):
        SafetensorsSource(directory)


def test_one_file_beside_the_index_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers reads is read, and said; an index that names the one file alone is no other model."""
    old = {f"model-0000{i}-of-00002.safetensors": {name: tensors()[name]} for i, name in ((1, "a.weight"), (2, "c"))}
    directory = model_directory(tmp_path / "m", old, index=True)
    new = {name: np.asarray(tensor + 1) for name, tensor in tensors().items()}
    save_file(new, directory / "model.safetensors")
    with SafetensorsSource(directory) as source:
        for name, tensor in new.items():
            np.testing.assert_array_equal(source.read(name), tensor)
    assert "reading model.safetensors; model.safetensors.index.json and its files are ignored" in caplog.text
    caplog.clear()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    SafetensorsSource(directory).close()
    assert not caplog.records


def test_an_index_that_names_the_one_file_among_others_is_read(tmp_path: Path) -> None:
    everything = list(tensors().items())
    files = {"model.safetensors": dict(everything[:2]), "model-2.safetensors": dict(everything[2:])}
    with SafetensorsSource(model_directory(tmp_path / "m", files, index=True)) as source:
        assert set(source.shapes) == set(tensors())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "m", {"adapter_model.safetensors": tensors()})
    with refused("only an adapter", "merge"):
        SafetensorsSource(directory)
    save_file(tensors(), directory / "other.safetensors")
    with SafetensorsSource(directory) as source:
        assert set(source.shapes) == set(tensors())


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "m", {"x.safetensors": tensors(), "y.safetensors": tensors()}, index=True)
    weight_map = {"a.weight": "x.safetensors", "b.weight": "y.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with refused("y.safetensors", "'a.weight'", "x.safetensors"):
        SafetensorsSource(directory)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "7",
        "{",
        "[" * 100_000,
        '{"t": 1}',
        '{"t": {}}',
        '{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"t": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"t": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"t": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        '{"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"t": {"dtype": "F4", "shape": [1], "data_offsets": [4, 0]}}',
        '{"t": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}',
    ],
)
def test_damaged_headers(tmp_path: Path, header: str) -> None:
    directory = model_directory(tmp_path / "m", {})
    raw = header.encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with refused("model.safetensors", "again"):
        SafetensorsSource(directory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_told(tmp_path: Path, share: float) -> None:
    directory = tmp_path / "m"
    if not directory.exists():
        model_directory(directory, {"whole.safetensors": tensors()})
    whole = (tmp_path / "m" / "whole.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with refused("model.safetensors"):
        SafetensorsSource(directory)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_corruption_of_the_header_is_told_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    directory = tmp_path / "m"
    if not directory.exists():
        model_directory(directory, {"whole.safetensors": tensors()})
    changed = bytearray((directory / "whole.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", changed[:8])[0]
    for position, byte in changes:
        changed[position % header] = byte
    (directory / "model.safetensors").write_bytes(changed)
    with suppress(UsageError), SafetensorsSource(directory) as source:
        for name in source.shapes:
            assert source.read(name).shape == source.shapes[name]


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    big = {f"t{i}": np.ones((100, 300), np.float32) for i in range(2)}
    directory = model_directory(tmp_path / "m", {"model.safetensors": big})
    with SafetensorsSource(directory) as source:
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(150_000)
        with refused("ends inside tensor"):
            for name in source.shapes:
                source.read(name)
