"""Images are preprocessed as transformers' processors do it."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
PIL = pytest.importorskip("PIL.Image")

import transformers  # noqa: E402

from ngc_jax.models.preprocessing import Preprocessor  # noqa: E402

# A pixel may be rounded otherwise; of 255, and divided by the smallest standard deviation.
TOLERANCE = 1.01 / 255 / 0.224
_CROP = {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}
CASES = {
    "vit": ("ViTImageProcessorPil", {"size": {"height": 20, "width": 24}}),
    "deit": ("DeiTImageProcessorPil", {"size": {"height": 26, "width": 26}, **_CROP}),
    "siglip_vision_model": ("SiglipImageProcessorPil", {"size": {"height": 20, "width": 20}}),
    "clip_vision_model": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 23}, **_CROP}),
    "dinov2": ("BitImageProcessorPil", {"size": {"shortest_edge": 23}, **_CROP}),
    "larger crop": ("BitImageProcessorPil", {"size": {"shortest_edge": 15}, **_CROP}),
    "nothing": ("ViTImageProcessorPil", {"do_resize": False, "do_normalize": False, "do_rescale": False}),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [(31, 45), (45, 31), (33, 33)])
def test_pixels(case, size, tmp_path) -> None:
    name, options = CASES[case]
    theirs = getattr(transformers, name)(**options)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    smooth = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    image = PIL.fromarray(smooth).resize(size, resample=PIL.Resampling.BICUBIC)
    expected = np.asarray(theirs(images=image, return_tensors="np")["pixel_values"])[0]
    found = Preprocessor.from_hf(written, case, 20)(image)
    assert found.shape == expected.shape
    tolerance = 1.01 if case == "nothing" else TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert np.abs(found - expected).mean() < tolerance / 20


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("vit", "ViTImageProcessorPil"),
        ("deit", "DeiTImageProcessorPil"),
        ("siglip_vision_model", "SiglipImageProcessorPil"),
        ("clip_vision_model", "CLIPImageProcessorPil"),
        ("dinov2", "BitImageProcessorPil"),
    ],
)
def test_a_model_without_a_preprocessor_has_that_of_its_family(family, name) -> None:
    smooth = np.random.default_rng(1).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    image = PIL.fromarray(smooth).resize((300, 270), resample=PIL.Resampling.BICUBIC)
    options = {"size": {"shortest_edge": 256}} if family == "dinov2" else {}
    if family == "dinov2":  # which has no processor of its own; its published files say this
        options |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    expected = np.asarray(getattr(transformers, name)(**options)(images=image, return_tensors="np")["pixel_values"])[0]
    found = Preprocessor.from_hf({}, family, 224)(image)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
