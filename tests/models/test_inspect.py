"""What is counted from headers alone is what a loaded model has."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.models.compact import compact_model, dense_model


def tied_head(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def nested(directory):
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors | {"vision_tower.x.weight": np.zeros((9, 9), np.float32)}


def bare(directory):
    return {n.removeprefix("model."): t for n, t in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("family", "change", "unused"),
    [
        ("llama", load_file, None),
        ("llama", tied_head, "lm_head.weight"),
        ("gemma3", nested, "vision_tower.x.weight"),
        ("qwen3", bare, None),
    ],
)
def test_what_a_model_does_not_use_is_counted_apart(family, change, unused, tmp_path):
    directory = save_model(dense_model(family), tmp_path / "model")
    tensors = change(directory / "model.safetensors" if change is load_file else directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with open_source(str(directory)) as source:
        summary = inspect_model(source).summary()
    assert summary["total_parameters"] == load_model(str(directory)).count_parameters()
    assert summary["keep_ratio"] == 1
    assert summary["unused_bytes"] == (0 if unused is None else tensors[unused].nbytes)
    assert summary["bytes"] + summary["unused_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_compact_model(tmp_path):
    model = compact_model()
    with open_source(str(save_model(model, tmp_path / "model"))) as source:
        summary = inspect_model(source).summary()
    assert summary["total_parameters"] == model.count_parameters()
    assert summary["stored_parameters"] == model.plan.count_parameters()
    assert summary["unused_bytes"] == 0


def test_tensors_that_do_not_fit_are_refused_and_not_counted_as_nothing(tmp_path):
    directory = save_model(dense_model(), tmp_path / "model")
    tensors = {f"other.{n}": t for n, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with open_source(str(directory)) as source, pytest.raises(UsageError, match="do not fit"):
        inspect_model(source)
