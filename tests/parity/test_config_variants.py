"""Older config.json files, and the multimodal wrapper of gemma 3, mean the same models."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from collections.abc import Callable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import transformers  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from ngc_jax.models.config import DecoderConfig  # noqa: E402
from ngc_jax.models.load import load_model  # noqa: E402
from tests.parity import tiny  # noqa: E402

# The families that transformers had when it wrote such files.
OLD = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def old_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 wrote: rope_theta and rope_scaling at the top, torch_dtype, no layer_types."""
    old = dict(config)
    old["torch_dtype"] = old.pop("dtype")
    layer_types = old.pop("layer_types", None)
    rope = old.pop("rope_parameters")
    if "full_attention" in rope:
        local = dict(rope["sliding_attention"])
        old["rope_local_base_freq"] = local.pop("rope_theta")
        assert local == {"rope_type": "default"}
        old["sliding_window_pattern"] = layer_types.index("full_attention") + 1
        rope = rope["full_attention"]
    rope = dict(rope)
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return old


def older_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `old_style`, with the rope's type under its first name."""
    old = old_style(config)
    if old["rope_scaling"] is not None:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    return old


@pytest.mark.parametrize("style", [old_style, older_style])
@pytest.mark.parametrize("case", [case for case, (family, _) in tiny.CASES.items() if family in OLD])
def test_old_configs(case: str, style: Callable[[Mapping[str, Any]], dict[str, Any]], tmp_path: Path) -> None:
    tiny.torch_config(case, dtype="float32").save_pretrained(tmp_path)
    new = tiny.read_config(tmp_path)
    assert "rope_parameters" in new  # else there is nothing to compare
    old = style(new)
    assert not {"rope_parameters", "dtype", "layer_types"} & set(old)
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)


@pytest.mark.parametrize(
    "case", [case for case, (family, _) in tiny.CASES.items() if family not in (*OLD, "olmo3", "ministral3", "gpt2")]
)
def test_old_configs_of_later_families(case: str, tmp_path: Path) -> None:
    """With the rotary settings where transformers 4 had them: base, share and scaling at the top."""
    tiny.torch_config(case, dtype="float32").save_pretrained(tmp_path)
    new = tiny.read_config(tmp_path)
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    neox = new["model_type"] == "gpt_neox"
    old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)


def test_old_config_of_a_model(tmp_path: Path) -> None:
    """Once with weights, and transformers agrees that the old file means the same."""
    theirs = tiny.torch_model("gemma3 linear")
    theirs.save_pretrained(tmp_path)
    tiny.write_config(tmp_path, old_style(tiny.read_config(tmp_path)))
    tokens = tiny.some_tokens()
    expected = tiny.torch_logits(theirs, tokens)
    np.testing.assert_array_equal(tiny.torch_logits(tiny.torch_load(tmp_path), tokens), expected)
    np.testing.assert_allclose(tiny.our_logits(load_model(str(tmp_path)), tokens), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A gemma 3 that also sees, as transformers saves it, and its logits for `tiny.some_tokens()`."""
    vision = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=tiny.torch_config("gemma3 linear"),
        vision_config=vision,
        mm_tokens_per_image=4,
        # Beyond the token ids in use.
        image_token_index=tiny.VOCAB + 1,
        boi_token_index=tiny.VOCAB + 2,
        eoi_token_index=tiny.VOCAB + 3,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    tiny.randomise(model)
    directory = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(directory)
    return directory, tiny.torch_logits(model, tiny.some_tokens())


@pytest.mark.parametrize("layout", ["as published", "as in memory"])
def test_multimodal_wrapper(multimodal: tuple[Path, np.ndarray], layout: str, tmp_path: Path) -> None:
    directory, expected = multimodal
    tensors = load_file(directory / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    assert any(name.startswith("language_model.model.") for name in tensors)
    if layout == "as in memory":  # where transformers 4.52 and later put the same tensors
        tensors = {f"model.{name.replace('model.model.', 'model.')}": tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        tiny.write_config(tmp_path, tiny.read_config(directory))
        directory = tmp_path
    ours = load_model(str(directory))
    np.testing.assert_allclose(tiny.our_logits(ours, tiny.some_tokens()), expected, rtol=0, atol=1e-4)
    assert ours.config.architecture == ours.hf_config["model_type"] == "gemma3_text"
