"""--tokenizer: a model with another model's tokenizer, in every command that reads text with a model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.models import load, sources
from ngc_jax.models.save import save_model
from tests.models.gguf.files import D, gguf_tensors, hf_tensors, metadata, write
from tests.models.gguf.test_tokenizer import to_metadata, trained
from tests.tiny import tiny_model

NEEDED = {
    "convert": ["--out", "out"],
    "demo": ["--out", "out"],
    "distil": ["--out", "out"],
    "export": ["--out", "out"],
    "compare": ["--out", "out", "--variants", "{a: {method: svd}}"],
    "generate": ["--prompt", "a"],
    "stability": ["--prompt", "a b c", "--out", "out"],
}
TAKING = [
    name
    for name, config in cli.COMMANDS.items()
    if {"model", "tokenizer"} <= {field.name for field in dataclasses.fields(config)}
]


def test_commands_that_take_a_tokenizer():
    assert {*NEEDED, "evaluate"} == set(TAKING)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tiny_model(), tmp_path_factory.mktemp("models") / "model"))


@pytest.mark.parametrize("name", TAKING)
def test_every_command_opens_its_model_with_the_tokenizer(name, model, tmp_path, monkeypatch, capsys):
    asked, really_open = [], sources.open_source

    def opened(model, *, tokenizer=None):
        if tokenizer is None:  # to see whether it has changed, say
            return really_open(model)
        asked.append((model, tokenizer))
        raise UsageError("that will do")

    monkeypatch.chdir(tmp_path)
    for module in (sources, load):
        monkeypatch.setattr(module, "open_source", opened)
    assert cli.main([name, model, "--tokenizer", "another", *NEEDED.get(name, [])]) == 2
    assert asked == [(model, "another")], capsys.readouterr().err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model with and without the name of its pre-tokenizer."""
    directory = tmp_path_factory.mktemp("gguf")
    keys = to_metadata(trained("smollm"), "smollm")
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    count = len(keys["tokenizer.ggml.tokens"])
    tensors["token_embd.weight"] = np.random.default_rng(0).normal(size=(count, D)).astype(np.float32)
    write(directory / "named.gguf", "llama", tensors, metadata("llama") | keys)
    del keys["tokenizer.ggml.pre"]
    write(directory / "silent.gguf", "llama", tensors, metadata("llama") | keys)
    (directory / "text.txt").write_text("it's 1998, they've said => (so) " * 30)
    return directory


def test_a_guess_is_warned_of_and_another_tokenizer_takes_its_place(files, tmp_path, capfd):
    found, said = {}, {}
    named, silent = str(files / "named.gguf"), str(files / "silent.gguf")
    for case, flags in (("named", [named]), ("silent", [silent]), ("given", [silent, "--tokenizer", named])):
        flags += ["--text", str(files / "text.txt"), "--window", "32", "--json", str(tmp_path / "x.json")]
        assert cli.main(["evaluate", *flags]) == 0
        found[case] = json.loads((tmp_path / "x.json").read_text())
        said[case] = [line for line in capfd.readouterr().err.splitlines() if "does not say how text is split" in line]
    assert (said["named"], said["given"]) == ([], [])
    assert len(said["silent"]) == 1
    assert found["silent"]["tokens"] != found["named"]["tokens"]
    for key in ("tokens", "perplexity", "bits_per_byte"):
        assert found["given"][key] == found["named"][key]
    assert (found["given"]["tokenizer"], found["silent"]["tokenizer"]) == (named, None)


def test_a_converted_model_keeps_the_tokenizer_that_was_given(files, tmp_path, capfd):
    named, silent = str(files / "named.gguf"), str(files / "silent.gguf")
    out = str(tmp_path / "out")
    flags = [
        "--tokenizer",
        named,
        "--method",
        "svd",
        "--rank",
        "full",
        "--out",
        out,
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert cli.main(["convert", silent, *flags]) == 0
    assert "does not say how text is split" not in capfd.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["tokenizer"] == named
    text = (files / "text.txt").read_text()
    with sources.open_source(named) as dense, sources.open_source(out) as compact:
        assert compact.tokenizer().encode(text).tolist() == dense.tokenizer().encode(text).tolist()


def test_a_report_gives_it_to_the_dense_model(files, model, tmp_path, monkeypatch, capsys):
    flags = ["report", model, "--tokenizer", str(files / "named.gguf"), "--prompt", "a", "--max-new-tokens", "1"]
    flags += ["--out", str(tmp_path / "r.html")]
    assert cli.main(flags) == 2
    assert "add --dense" in capsys.readouterr().err
    asked, opened = [], sources.open_source

    def open_and_tell(model, *, tokenizer=None, cache_dir=None):
        asked.append((Path(model).name, None if tokenizer is None else Path(tokenizer).name))
        return opened(model, tokenizer=tokenizer)

    monkeypatch.setattr(sources, "open_source", open_and_tell)
    assert cli.main([*flags, "--dense", str(files / "silent.gguf")]) == 0
    assert {("silent.gguf", "named.gguf"), ("model", None)} <= set(asked)
    assert "does not say how text is split" not in capsys.readouterr().err
