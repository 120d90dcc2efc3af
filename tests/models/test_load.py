"""Loading: every number in its place, in the right type, in little memory."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.exporting.folded import FoldedSource
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.keys import hf_name
from ngc_jax.models.load import load_model, parameter_shapes, read_plan
from ngc_jax.models.sources import open_source
from tests.models.compact import compact_model, compact_plan
from tests.tiny import HF_CONFIGS, tiny_tokenizer

SMALL = {**HF_CONFIGS["llama_untied"], "num_hidden_layers": 1}


def write_model(directory: Path, config: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Write a random dense model, and return its tensors."""
    rng = np.random.default_rng(0)
    decoder_config = DecoderConfig.from_hf(config)
    tensors = {
        hf_name(name, decoder_config): rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in parameter_shapes(Decoder(decoder_config)).items()
    }
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def flat_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_every_tensor_in_its_place(stored: Any, dtype: str | None, tmp_path: Path) -> None:
    tensors = write_model(tmp_path, SMALL, stored)
    model = load_model(str(tmp_path), dtype=dtype)
    assert model.dtype == jnp.dtype(dtype or "float32")  # on a CPU
    params = flat_params(model.params)
    assert params.keys() == parameter_shapes(model.decoder).keys()
    for name, leaf in params.items():
        assert leaf.dtype == model.dtype
        np.testing.assert_array_equal(leaf, tensors[hf_name(name, model.config)].astype(leaf.dtype), err_msg=name)
    assert model.count_parameters() == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize(
    ("given", "stored", "computed"),
    [
        ({}, "float32", "float32"),
        ({"param_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"dtype": "bfloat16", "param_dtype": "float32"}, "float32", "bfloat16"),
        ({"dtype": jnp.float32, "param_dtype": jnp.bfloat16}, "bfloat16", "float32"),
    ],
)
def test_storage_and_computation(given: dict[str, Any], stored: str, computed: str, tmp_path: Path) -> None:
    write_model(tmp_path, HF_CONFIGS["llama"])
    model = load_model(str(tmp_path), **given)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(stored)}
    assert (model.param_dtype, model.dtype, model.decoder.compute_dtype) == (stored, computed, computed)
    with pytest.raises(UsageError, match="expected float32, bfloat16 or float16"):
        load_model(str(tmp_path), **{**given, "dtype": "int8"})
    with pytest.raises(UsageError, match="'half-ish' is not supported"):
        load_model(str(tmp_path), param_dtype="half-ish")


def test_what_comes_with_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "named", SMALL)
    tiny_tokenizer().save(tmp_path / "named")
    model = load_model(str(tmp_path / "named"))
    assert (model.name, model.plan, model.conversion) == ("named", None, None)
    assert model.hf_config == SMALL
    assert model.config == DecoderConfig.from_hf(SMALL)
    assert model.load_tokenizer().decode([72, 105]) == tiny_tokenizer().decode([72, 105])


def test_progress_is_told_after_every_tensor(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, SMALL)
    told: list[tuple[int, int]] = []
    load_model(str(tmp_path), progress=lambda *counts: told.append(counts))
    assert told == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]


def test_a_multimodal_model_becomes_its_text_part(tmp_path: Path) -> None:
    text = {**HF_CONFIGS["gemma3"], "num_hidden_layers": 1}
    tensors = write_model(tmp_path, text)
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["vision_tower.post_layernorm.weight"] = np.zeros(7, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    wrapper = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    model = load_model(str(tmp_path))
    assert model.hf_config == {**text, "architectures": ["Gemma3ForCausalLM"]}
    np.testing.assert_array_equal(model.params["norm"]["scale"], tensors["language_model.model.norm.weight"])


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    write_model(tmp_path / "gone", SMALL)
    (tmp_path / "gone" / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 2}))
    with pytest.raises(
        UsageError, match=r"^the tensors of gone do not fit its config\.json: missing model\.layers\.1\."
    ):
        load_model(str(tmp_path / "gone"))


def fold(path: str) -> None:
    with open_source(path) as source:
        FoldedSource(source)


@pytest.mark.parametrize("open_it", [load_model, fold])
def test_a_tied_head_that_differs_is_refused(open_it: Any, tmp_path: Path) -> None:
    """transformers 4 reads the embedding twice, transformers 5 both tensors: neither is chosen without a word."""
    tensors = write_model(tmp_path, {**HF_CONFIGS["llama"], "num_hidden_layers": 1})
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    open_it(str(tmp_path))
    head[-1, 3] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"'lm_head.weight' differs from .*; set tie_word_embeddings to false to use"):
        open_it(str(tmp_path))


SECTION = {"plan": compact_plan(compact_model().config).to_json()}
CONFIG = compact_model().config


def test_a_plan_is_read() -> None:
    assert read_plan(None, CONFIG, "it") is None
    assert read_plan(SECTION, CONFIG, "it") == compact_plan(CONFIG)
    assert read_plan(json.loads(json.dumps(SECTION)), CONFIG, "it") == compact_plan(CONFIG)


@pytest.mark.parametrize("section", [{}, {"format": 1}, [], "plan"])
def test_a_section_without_a_plan(section: Any) -> None:
    with pytest.raises(UsageError, match=r"^config\.json of it has a section 'ngc' without a plan; convert"):
        read_plan(section, CONFIG, "it")


@pytest.mark.parametrize(
    "block",
    [
        {"name": "layers.9.attn.q", "shape": [40, 24], "bias": True},  # no such layer
        {"name": "layers.0.attn.q", "shape": [24, 40], "bias": True},  # another shape
        {"name": "layers.0.attn.q", "shape": [40, 24], "bias": False},  # another bias
    ],
)
def test_a_plan_for_another_model(block: Mapping[str, Any]) -> None:
    section = {"plan": {"groups": [], "dense": [block]}}
    with pytest.raises(UsageError, match=rf"^the plan of it has .*{block['name']}.* which its config\.json does not"):
        read_plan(section, CONFIG, "it")


# Run in a process of its own: how far the resident memory rises while a model is loaded.
MEASURE = """
    import sys
    from pathlib import Path
    from ngc_jax.models.load import load_model

    def resident(name):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    small, large = sys.argv[1:]
    load_model(small, dtype="float32")  # what is allocated once: compiled programs, thread pools
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = resident("VmRSS")
    model = load_model(large, dtype="float32")
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_peak_memory_is_the_model_and_one_tensor(stored: Any, tmp_path: Path) -> None:
    config = {
        **SMALL,
        "vocab_size": 16_000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "head_dim": 64,
    }
    write_model(tmp_path / "small", SMALL)
    tensors = write_model(tmp_path / "large", config, stored)
    final = sum(4 * tensor.size for tensor in tensors.values())
    largest = max(4 * tensor.size for tensor in tensors.values())
    assert final > 300e6
    assert largest < 0.25 * final
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    rise = int(run.stdout)
    assert rise > 0.95 * final  # else it is not measured
    assert rise < 1.15 * final + largest + 20e6


def test_loading_does_not_keep_what_it_read(tmp_path: Path) -> None:
    """Parameters are arrays of the device's, not views of files: they outlive the files."""
    tensors = write_model(tmp_path, SMALL)
    model = load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(model.params["norm"]["scale"], tensors["model.norm.weight"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
