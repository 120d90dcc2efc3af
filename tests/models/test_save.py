"""Saving: what is read back is the same to the bit, and a directory is made whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file

from ngc_jax.errors import UsageError
from ngc_jax.files import check_output
from ngc_jax.groups.plan import Plan
from ngc_jax.models import save
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.keys import hf_name
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.save import save_model, tensor_bytes
from ngc_jax.models.sources import open_source
from tests.models.compact import compact_model, compact_plan, dense_model, fixed_gauge_model
from tests.tiny import random_tokens


def assert_same(loaded: LanguageModel, saved: LanguageModel) -> None:
    assert (loaded.config, loaded.plan, loaded.dtype) == (saved.config, saved.plan, saved.dtype)
    before, after = (traverse_util.flatten_dict(model.params) for model in (saved, loaded))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=str(path))


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("make", [dense_model, compact_model, fixed_gauge_model])
def test_round_trip(make, architecture: str, dtype: str, tmp_path: Path) -> None:
    model = make(architecture, dtype)
    assert save_model(model, tmp_path / "out") == tmp_path / "out"
    assert_same(load_model(str(tmp_path / "out"), dtype=dtype), model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert tensor_bytes(tmp_path / "out") > model.count_parameters() * model.dtype.itemsize


# Run in a process of its own, which has seen nothing of the model but its directory.
READ = """
    import sys
    import jax
    import numpy as np
    from ngc_jax.models.load import load_model

    tokens = np.load(sys.argv[1])
    for directory in sys.argv[2:]:
        model = load_model(directory)
        logits, _ = jax.jit(model.decoder.apply)({"params": model.params}, tokens)
        np.save(directory + "/logits.npy", logits)
"""


def test_another_process_computes_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    tokens = random_tokens(22).reshape(2, 11)
    np.save(tmp_path / "tokens.npy", tokens)
    makers = {"dense": dense_model, "compact": compact_model, "fixed": fixed_gauge_model}
    models = {str(tmp_path / name): make() for name, make in makers.items()}
    for directory, model in models.items():
        save_model(model, directory)
    command = [sys.executable, "-c", textwrap.dedent(READ), str(tmp_path / "tokens.npy"), *models]
    subprocess.run(command, check=True)
    for directory, model in models.items():
        logits, _ = jax.jit(model.decoder.apply)({"params": model.params}, jnp.asarray(tokens))
        np.testing.assert_array_equal(np.load(f"{directory}/logits.npy"), logits)


def test_what_goes_with_the_tensors(tmp_path: Path) -> None:
    model = dense_model()
    save_model(model, tmp_path / "out")
    assert left_in(tmp_path) == ["out"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(left_in(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 reads no other
    assert (tmp_path / "out" / "README.md").read_text().split("---\n\n")[1].startswith("# out\n")
    loaded = load_model(str(tmp_path / "out"))
    text = "Groups of neurons"
    np.testing.assert_array_equal(loaded.load_tokenizer().encode(text), model.load_tokenizer().encode(text))
    own = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"}
    assert loaded.hf_config == {**model.hf_config, **own}
    assert loaded.conversion is None
    save_model(model, tmp_path / "carded", card="# A card\n")
    assert (tmp_path / "carded" / "README.md").read_text() == "# A card\n"


def test_how_a_model_was_made_stays_with_it(tmp_path: Path) -> None:
    details = {"method": "states", "tokens": 4096}
    save_model(compact_model(), tmp_path / "first", conversion=details)
    first = load_model(str(tmp_path / "first"))
    assert first.conversion == details
    assert "ngc" not in first.hf_config
    save_model(first, tmp_path / "second")
    assert load_model(str(tmp_path / "second")).conversion == first.conversion


def test_pivots_are_integers_of_the_config_and_no_parameters(tmp_path: Path) -> None:
    model = fixed_gauge_model()
    save_model(model, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert '"pivots": [2, 9, 23, 24, 30, 35]' in text  # on one line: there can be thousands
    assert Plan.from_json(json.loads(text)["ngc"]["plan"]) == model.plan
    with open_source(str(tmp_path / "out")) as source:
        assert inspect_model(source).stored_parameters() == model.plan.count_parameters()


def test_tensors_have_hugging_faces_names(tmp_path: Path) -> None:
    model = compact_model()
    save_model(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == {
        hf_name(".".join(path), model.config) for path in traverse_util.flatten_dict(model.params)
    }
    q_bias = tensors["model.layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(q_bias, model.params["layers"]["0"]["attn"]["q"]["bias"])
    assert "model.layers.0.self_attn.q_proj.weight" not in tensors
    assert tensors["groups.0-qkk.output_states.layers.1.attn.k"].shape == (20, 5)


@pytest.mark.parametrize("make", [dense_model, compact_model])
def test_shards(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 10_000
    monkeypatch.setattr(save, "SHARD_BYTES", limit)
    model = make()
    save_model(model, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weight_map = {}
    for file in files:
        tensors = load_file(file)
        weight_map |= dict.fromkeys(tensors, file.name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == 4 * model.count_parameters()
    assert_same(load_model(str(tmp_path / "out")), model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory with something else in it."""
    save_model(dense_model(), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return tmp_path / "out"


def test_an_existing_directory_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"out exists; choose another --out or add --overwrite$"):
        save_model(compact_model(), saved)
    assert (saved / "notes.txt").exists()


def test_overwrite_replaces_all_of_it(saved: Path) -> None:
    model = compact_model("gemma3")
    save_model(model, saved, overwrite=True)
    assert_same(load_model(str(saved)), model)
    assert not (saved / "notes.txt").exists()
    assert left_in(saved.parent) == ["out"]


def test_a_model_can_take_its_own_place(saved: Path) -> None:
    model = load_model(str(saved))
    save_model(model, saved, overwrite=True)
    assert_same(load_model(str(saved)), model)


def test_overwrite_of_a_link_replaces_what_it_points_to(saved: Path) -> None:
    link = saved.parent / "link"
    link.symlink_to(saved)
    model = compact_model("gemma3")
    save_model(model, link, overwrite=True)
    assert link.is_symlink()
    assert_same(load_model(str(saved)), model)
    assert not (saved / "notes.txt").exists()


@pytest.mark.parametrize("content", [["notes.txt"], ["config.json"], ["model.safetensors"]])
def test_what_is_no_model_is_never_overwritten(content: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in content:
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(UsageError, match=r"out is not a model directory and will not be overwritten; choose another"):
        save_model(dense_model(), tmp_path / "out", overwrite=True)
    assert left_in(tmp_path / "out") == content


def test_files_are_never_overwritten_and_dead_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a model directory"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        check_output(tmp_path / "link", overwrite=False)
    assert check_output(tmp_path / "link", overwrite=True) == tmp_path / "nowhere"
    with pytest.raises(UsageError, match=r"cannot be created in .*/file; choose an --out that can be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_model(dense_model(), tmp_path / "out", overwrite=True)
    assert load_model(str(tmp_path / "out")).plan is None


def test_parents_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(dense_model(), "runs/today/out")
    assert (tmp_path / "runs" / "today" / "out" / "config.json").exists()


def test_the_current_directory_has_a_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    save_model(compact_model(), ".", overwrite=True)
    assert load_model(str(saved)).plan == compact_plan(compact_model().config)
    assert left_in(saved.parent) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="choose an --out that can be written"):
        check_output(tmp_path / "out", overwrite=False)


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def interrupted() -> None:
    raise Interrupted


@pytest.mark.parametrize("where", ["tensors", "tokenizer", "text"])
def test_failure_leaves_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model()
    if where == "tokenizer":
        model = dataclasses.replace(model, load_tokenizer=interrupted)
    else:
        name = {"tensors": "_write_tensors", "text": "_write_text"}[where]
        monkeypatch.setattr(save, name, lambda *_: interrupted())
    with pytest.raises(Interrupted):
        save_model(model, tmp_path / "runs" / "today" / "out")
    assert left_in(tmp_path) == []


def test_failure_leaves_the_old_model(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(Interrupted):
        save_model(dataclasses.replace(compact_model(), load_tokenizer=interrupted), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert left_in(saved.parent) == ["out"]


def test_failure_to_take_the_place_puts_the_old_model_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.startswith(".out-") and path.parent == saved.parent:  # the new one, on its way
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        save_model(compact_model(), saved, overwrite=True)
    assert left_in(saved.parent) == ["out"]
    assert (saved / "notes.txt").read_text() == "mine"
