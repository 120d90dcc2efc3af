"""The contract of every family of image encoders: what transformers computes is computed here, and written for it."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from ngc_jax.models.families.encoders import ENCODERS  # noqa: E402
from ngc_jax.models.load import load_model  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402

TOLERANCE = 1e-4
# 24 wide with 4 heads; 3 channels; 12 pixels are 9 patches of 4. All sizes differ.
_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12, "patch_size": 4}
_MLP = {"intermediate_size": 40}
_DINO = {"mlp_ratio": 2, "num_labels": 5}
CASES = {
    "vit": ("ViTForImageClassification", {**_MLP, "num_labels": 5}),
    "vit without biases": ("ViTForImageClassification", {**_MLP, "num_labels": 5, "qkv_bias": False}),
    "vit without a head": ("ViTModel", _MLP),
    "deit": ("DeiTForImageClassificationWithTeacher", {**_MLP, "num_labels": 5}),
    "deit without a teacher": ("DeiTForImageClassification", {**_MLP, "num_labels": 5}),
    "dinov2": ("Dinov2ForImageClassification", _DINO),
    "dinov2 without a head": ("Dinov2Model", {"mlp_ratio": 2}),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", {**_DINO, "num_register_tokens": 2}),
    "siglip_vision_model": ("SiglipVisionModel", _MLP),
    "clip_vision_model": ("CLIPVisionModelWithProjection", {**_MLP, "projection_dim": 7}),
    "clip without a projection": ("CLIPVisionModel", _MLP),
}


def torch_encoder(case: str) -> "transformers.PreTrainedModel":
    """A model whose parameters are all random, in evaluation mode."""
    name, options = CASES[case]
    kind = getattr(transformers, name)
    torch.manual_seed(len(case))
    model = kind(kind.config_class(**_SIZES, **options)).eval()
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if ("norm" in one and one.endswith("weight")) or "lambda" in one:
                parameter.add_(1.0)
    return model


def some_images(size: int = 12, height: int | None = None) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, height or size, size)).astype(np.float32)


def torch_outputs(model, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the head returns, and the tokens after the last layer, normed."""
    with torch.no_grad():
        out = model(torch.tensor(pixels), output_hidden_states=True)
        base = (
            getattr(model, model.base_model_prefix, model) if not hasattr(model, "vision_model") else model.vision_model
        )
        tokens = out.hidden_states[-1]
        norm = getattr(base, "layernorm", None) or getattr(base, "post_layernorm", None)
        tokens = norm(tokens)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None and type(model).__name__ != "ViTModel":
            return getattr(out, name).numpy(), tokens.numpy()
    return tokens[:, 0].numpy(), tokens.numpy()


def our_outputs(model, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variables = {"params": model.params}
    hidden = model.encoder.apply(variables, pixels, method="hidden")
    return np.asarray(model.encoder.apply(variables, hidden, method="logits")), np.asarray(hidden)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """A model by transformers and by us, its directory and the name of its case."""
    directory = tmp_path_factory.mktemp("encoder")
    theirs = torch_encoder(request.param)
    theirs.save_pretrained(directory)
    return theirs, load_model(str(directory)), directory, request.param


def test_outputs_and_hidden_states(pair) -> None:
    theirs, ours, _, case = pair
    pixels = some_images()
    expected, tokens = torch_outputs(theirs, pixels)
    found, hidden = our_outputs(ours, pixels)
    if case in ("dinov2 without a head",):  # whose output has the mean of the patches too
        found = found[:, : expected.shape[1]]
    assert expected.std() > 0.1
    assert found.shape == expected.shape
    worst = float(np.abs(found - expected).max())
    if (decoders := os.environ.get("NGC_PARITY_ERRORS")) and case in ENCODERS:
        file = Path(decoders).with_name("encoder_errors.json")
        errors = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**errors, case: float(f"{worst:.0e}")}, indent=1) + "\n")
    assert worst < TOLERANCE
    np.testing.assert_allclose(hidden, tokens, rtol=0, atol=TOLERANCE)


def test_what_is_saved_is_read_by_transformers(pair, tmp_path) -> None:
    theirs, ours, directory, _ = pair
    save_model(ours, tmp_path / "again")
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    extra = {name for name in before if "pooler." in name or "mask_token" in name or "position_ids" in name}
    bare = "" if after.keys() & before.keys() else next(iter(after)).split(".")[0] + "."
    if type(theirs).__name__ == "SiglipVisionModel":
        bare = "vision_model."
    assert {name.removeprefix(bare) for name in after} == before.keys() - extra
    again, report = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    assert all("pooler" in name or "mask_token" in name for name in report["missing_keys"]), report
    pixels = some_images()
    for one, other in zip(torch_outputs(again.eval(), pixels), torch_outputs(theirs, pixels), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    read = load_model(str(tmp_path / "again"))
    assert read.config == ours.config
    np.testing.assert_array_equal(our_outputs(read, pixels)[0], our_outputs(ours, pixels)[0])


@pytest.mark.parametrize("case", ["dinov2", "dinov2_with_registers"])
def test_positions_are_interpolated_as_in_transformers(case, tmp_path) -> None:
    theirs = torch_encoder(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    for pixels in (some_images(20), some_images(8, 16), some_images(21, 13)):
        expected, tokens = torch_outputs(theirs, pixels)
        found, hidden = our_outputs(ours, pixels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(hidden, tokens, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_image_tower_of_a_model_of_two(kind, tmp_path) -> None:
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    vision, text = small | {"image_size": 12, "patch_size": 4}, small | {"vocab_size": 30}
    config = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[kind]
    own = {"projection_dim": 7} if kind == "clip" else {}
    model_type = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    theirs = model_type(config(text_config=text, vision_config=vision, **own)).eval()
    theirs.save_pretrained(tmp_path)
    ours, pixels = load_model(str(tmp_path)), some_images()
    with torch.no_grad():
        found = theirs.get_image_features(torch.tensor(pixels))
    expected = (found if isinstance(found, torch.Tensor) else found.pooler_output).numpy()
    np.testing.assert_allclose(our_outputs(ours, pixels)[0], expected, rtol=0, atol=TOLERANCE)
    assert dataclasses.asdict(ours.config)["causal"] is False
