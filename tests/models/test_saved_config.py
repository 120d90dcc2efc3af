"""A saved model is called what it is, and is read back as what it was."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.models.compact import compact_model, dense_model
from tests.tiny import forward, random_tokens

TOKENS = random_tokens(20)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def write_config(directory, config):
    (directory / "config.json").write_text(json.dumps(config))


def logits(model):
    return np.asarray(forward(model.params, jnp.asarray(TOKENS)[None], decoder=model.decoder)[0])


def test_a_grouped_model_is_of_a_type_of_its_own_and_is_read_back(tmp_path):
    model = compact_model()
    model = dataclasses.replace(model, hf_config={**model.hf_config, "architectures": ["LlamaForCausalLM"]})
    stored = config_of(save_model(model, tmp_path / "grouped"))
    assert (stored["model_type"], stored["architectures"]) == ("ngc", ["NgcForCausalLM"])
    assert (stored["ngc"]["model_type"], stored["ngc"]["architectures"]) == ("llama", ["LlamaForCausalLM"])
    read = load_model(str(tmp_path / "grouped"))
    assert read.hf_config["model_type"] == "llama"
    assert read.hf_config["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_array_equal(logits(read), logits(model))


def test_depth_that_is_unrolled_is_of_a_type_of_its_own_too(tmp_path):
    model = dense_model(ngc_iterations=2)
    stored = config_of(save_model(model, tmp_path / "unrolled"))
    assert stored["model_type"] == "ngc"
    read = load_model(str(tmp_path / "unrolled"))
    assert read.plan is None
    assert read.config.iterations == 2
    np.testing.assert_array_equal(logits(read), logits(model))


def test_dense_and_pruned_models_stay_of_their_own_type(tmp_path):
    model = dense_model()
    assert config_of(save_model(model, tmp_path / "dense"))["model_type"] == "llama"
    plan = Plan(dense=tuple(block for block in model.config.blocks() if ".mlp." in block.name), removed=100)
    pruned = dataclasses.replace(model, plan=plan, conversion={"method": "nystrom"})
    stored = config_of(save_model(pruned, tmp_path / "pruned"))
    assert stored["model_type"] == "llama"
    assert load_model(str(tmp_path / "pruned")).plan == plan
    assert load_model(str(tmp_path / "pruned")).conversion == {"method": "nystrom"}


def test_directories_of_the_first_format_still_load(tmp_path):
    model = compact_model()
    directory = save_model(model, tmp_path / "old", conversion={"method": "ngc"})
    stored = config_of(directory)
    section = {name: value for name, value in stored["ngc"].items() if name not in ("model_type", "architectures")}
    write_config(directory, {**stored, "model_type": "llama", "ngc": {**section, "format": 1}})
    read = load_model(str(directory))
    assert read.conversion == {"method": "ngc"}
    np.testing.assert_array_equal(logits(read), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngc": None}, "does not say which architecture"),
        ({"ngc": {"plan": {}}}, "does not say which architecture"),
        ({"ngc": {"format": 99}}, "install a newer ngc-jax"),
        ({"ngc": {"format": "x"}}, "install a newer ngc-jax"),
        ({"ngc": []}, "without a plan"),
    ],
)
def test_a_damaged_section_is_refused(changes, message, tmp_path):
    directory = save_model(compact_model(), tmp_path / "damaged")
    stored = config_of(directory) | changes
    write_config(directory, {name: value for name, value in stored.items() if value is not None})
    with pytest.raises(UsageError, match=message):
        load_model(str(directory))


def test_what_was_true_of_the_source_only_is_not_written(tmp_path):
    stale = {"quantization_config": {"quant_method": "gptq"}, "auto_map": {"AutoModel": "x.py"}, "_name_or_path": "a/b"}
    model = dense_model()
    model = dataclasses.replace(model, hf_config={**model.hf_config, **stale, "transformers_version": "4.1"})
    assert not {*stale, "transformers_version"} & set(config_of(save_model(model, tmp_path / "out")))


def test_every_config_that_is_read_is_split(tmp_path):
    """A nested config of a multimodal model with our section: the text part and the section are both found."""
    model = compact_model("gemma3")
    directory = save_model(model, tmp_path / "nested")
    stored = config_of(directory)
    section = stored.pop("ngc")
    write_config(directory, {"model_type": "ngc", "text_config": stored, "ngc": {**section, "model_type": "gemma3"}})
    read = load_model(str(directory))
    assert read.config == DecoderConfig.from_hf(model.hf_config)
    assert read.plan == model.plan
