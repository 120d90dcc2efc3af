"""Uploads, to a stub of the hub's API."""

import dataclasses
import types

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from ngc_jax import UsageError, cli, export, push
from ngc_jax.models.save import save_model
from tests.exporting.test_export import bpe_tokenizer, model_of
from tests.tiny import tiny_model


class Hub:
    """Remembers what it is asked for."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo, options))

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return types.SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = dataclasses.replace(tiny_model("llama"), load_tokenizer=bpe_tokenizer)
    return save_model(model, tmp_path_factory.mktemp("models") / "model")


def test_what_is_uploaded(directory):
    (directory / "notes.txt").write_text("mine")
    hub = Hub()
    summary = push(directory, "me/model", private=True, api=hub)
    (_, repo, created), (_, uploaded) = hub.calls
    assert repo == "me/model"
    assert created["private"] is True
    assert uploaded["folder_path"] == directory
    names = uploaded["allow_patterns"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(names)
    assert "notes.txt" not in names
    assert summary["bytes"] == sum((directory / name).stat().st_size for name in names)
    assert summary["url"] == "https://hub/commit/1"


def test_a_grouped_directory_has_its_code(tmp_path):
    model = dataclasses.replace(model_of("llama"), load_tokenizer=bpe_tokenizer)
    export(model, tmp_path / "grouped", to="hf-grouped")
    names = {file["name"] for file in push(tmp_path / "grouped", "me/model", dry_run=True)["files"]}
    assert {"modeling_ngc.py", "configuration_ngc.py"} <= names


def test_a_dry_run_asks_for_nothing(directory, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.setattr(huggingface_hub, "get_token", None)
    assert cli.main(["push", str(directory), "--repo", "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was uploaded" in printed
    assert "model.safetensors" in printed
    assert (directory / "README.md").read_text().splitlines()[-1].strip() in printed


@pytest.mark.parametrize(
    ("repo", "words"),
    [("model", "expected OWNER/NAME"), ("me/", "expected OWNER/NAME"), ("a/b/c", "expected OWNER/NAME")],
)
def test_names_that_are_none(directory, repo, words):
    with pytest.raises(UsageError, match=words):
        push(directory, repo, dry_run=True)


def test_directories_that_are_none(directory, tmp_path):
    with pytest.raises(UsageError, match="is no directory"):
        push(tmp_path / "nothing", "me/model", dry_run=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="expected a model directory"):
        push(tmp_path / "empty", "me/model", dry_run=True)
    (tmp_path / "empty" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="the model card; add one"):
        push(tmp_path / "empty", "me/model", dry_run=True)


def test_without_a_token_and_where_the_hub_refuses(directory, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no token for the Hugging Face hub"):
        push(directory, "me/model")
    response = types.SimpleNamespace(status_code=403, headers={}, request=None)
    error = HfHubHTTPError("403 Forbidden: you have no rights", response=response)
    with pytest.raises(UsageError, match="did not take the upload"):
        push(directory, "me/model", api=Hub(error))
