"""The image encoder: its config, what attention sees, and what is refused. Numbers: tests/parity/test_encoders.py."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.encoder import bicubic
from ngc_jax.models.encoder_config import EncoderConfig
from ngc_jax.models.families.encoders import ENCODERS, encoder_table
from ngc_jax.models.images import Images, ImageStream
from ngc_jax.models.load import load_model
from ngc_jax.models.preprocessing import Preprocessor, image_files
from ngc_jax.models.save import save_model
from tests.tiny_encoder import HF_ENCODERS, tiny_encoder, tiny_images

DOCS, ERRORS = Path(__file__).parents[2] / "docs", Path(__file__).parents[1] / "parity" / "encoder_errors.json"


def test_the_page_has_the_table_of_measured_families():
    errors = json.loads(ERRORS.read_text())
    assert set(errors) == set(ENCODERS)
    assert max(errors.values()) < 1e-4
    assert encoder_table(errors) in (DOCS / "architectures.md").read_text()


def test_every_token_sees_every_other():
    """By derivatives: each output token of one layer depends on each patch."""
    model = tiny_encoder()
    module = model.encoder

    def tokens(pixels):
        return module.apply({"params": model.params}, pixels, method="hidden")[0].sum(axis=-1)

    slopes = jax.jacrev(tokens)(jnp.asarray(tiny_images(1)))[:, 0]  # (L, C, S, S)
    by_patch = jnp.abs(slopes).reshape(10, 3, 3, 4, 3, 4).sum(axis=(1, 3, 5))
    assert (np.asarray(by_patch) > 1e-6).all()


def test_padded_images_change_nothing():
    model, pixels = tiny_encoder(), tiny_images(5)
    stream = ImageStream(Images(pixels, np.arange(5, dtype=np.int32)), 10)
    batches = stream.batches(3)
    assert [one.pixels.shape[0] for one, _ in batches] == [3, 3]
    assert batches[1][1].max(axis=1).tolist() == [0, 0, -1]
    assert not batches[1][0].pixels[2].any()
    np.testing.assert_array_equal(np.concatenate([one.targets for one, _ in batches])[:5], np.arange(5))
    alone = model.encoder.apply({"params": model.params}, pixels[3:])
    padded = model.encoder.apply({"params": model.params}, batches[1][0].pixels)[:2]
    np.testing.assert_allclose(alone, padded, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "new"), [(5, 9), (9, 4), (3, 3)])
def test_interpolation_keeps_constants_and_straight_lines(antialias, size, new):
    matrix = bicubic(size, new, antialias=antialias).astype(np.float64)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    places = (np.arange(new) + 0.5) * size / new - 0.5
    inside = (places >= 1) & (places <= size - 2) if not antialias else np.zeros(new, bool)
    # a = -0.75 reproduces lines only at its nodes and halfway; -0.5 does so everywhere that the kernel is not cut off.
    reach = 2 * max(size / new, 1.0)
    inside |= antialias & (places >= reach - 0.5) & (places <= size - reach - 0.5) & (size <= new)
    halves = np.isclose(places * 2 % 1, 0)
    np.testing.assert_allclose((matrix @ np.arange(size))[inside & halves], places[inside & halves], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [12, 16]}, "expected a square"),
        ({"patch_size": 16}, "no patch of 16"),
        ({"num_attention_heads": 5}, "5 heads do not divide 24"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "expected ViTForImageClassification or ViTModel"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"model_type": "swin"}, "image encoder 'swin' is not supported; expected one of vit, deit"),
        ({"model_type": "dinov2", "architectures": None, "mlp_ratio": 4, "use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"model_type": "clip", "vision_config": 3}, "no vision_config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        EncoderConfig.from_hf({**HF_ENCODERS["vit"], **changes})


def test_a_decoder_s_config_refuses_encoders_by_name():
    with pytest.raises(UsageError, match="vit is an image encoder"):
        DecoderConfig.from_hf(HF_ENCODERS["vit"])


@pytest.mark.parametrize("family", list(HF_ENCODERS))
def test_saved_and_loaded(family, tmp_path):
    model = dataclasses.replace(tiny_encoder(family), preprocessor_config={"size": {"height": 12, "width": 12}})
    again = load_model(str(save_model(model, tmp_path / "model")))
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert (again.config, again.preprocessor_config) == (model.config, model.preprocessor_config)
    assert "image" in (tmp_path / "model" / "README.md").read_text()


def test_tensors_that_do_not_fit_are_named(tmp_path):
    directory = save_model(tiny_encoder(), tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    wrong = {**tensors, "vit.layernorm.weight": np.ones(25, np.float32), "vit.extra": np.ones(2, np.float32)}
    del wrong["classifier.bias"]
    save_file(wrong, file)
    named = r"missing classifier\.bias.*vit\.layernorm\.weight is \(25,\).*left over vit\.extra"
    with pytest.raises(UsageError, match=named):
        load_model(str(directory))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"size": {"longest_edge": 3}}, "size in preprocessor_config.json"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"rescale_factor": -1}, "rescale_factor"),
        ({"do_center_crop": True, "crop_size": "x"}, "crop_size"),
    ],
)
def test_preprocessors_that_are_refused(entry, message):
    with pytest.raises(UsageError, match=message):
        Preprocessor.from_hf(entry, "vit", 12)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="is not an image that can be read"):
        Preprocessor((8, 8)).load(image_files(tmp_path))
    with pytest.raises(UsageError, match="has no images"):
        image_files(DOCS / "howto")
