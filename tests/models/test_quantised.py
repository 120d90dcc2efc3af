"""Quantised checkpoints: 8-bit ones are read as NumPy reads them; all others are refused by their names."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.exporting.huggingface import export_huggingface
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.models.compact import dense_model
from tests.tiny import tiny_model

COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 8]}


@pytest.fixture
def directory(tmp_path):
    return save_model(dense_model(), tmp_path / "model")


def rewrite(directory, change, config):
    """Replace every projection by the result of `change`: a dict of suffixes and tensors."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors |= {name + suffix: value for suffix, value in change(tensors.pop(name)).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stored = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stored if config is None else {**stored, **config}))
    return tensors


def float8(weight, scale):
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn)


def by_tensor(weight):
    scale = np.float32(np.abs(weight).max() / 448)
    return {"": float8(weight, scale), "_scale": np.asarray([scale]), "_input": np.zeros(1, np.float32)} | {}


def by_row(weight):
    scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / 127
    return {"": np.round(weight / scale).astype(np.int8), "_scale": scale}


def by_row_with_zero(weight):
    quantised = by_row(weight)
    zero = np.arange(len(weight), dtype=np.int8)[:, None] % 3
    return quantised | {"": (quantised[""] // 2 + zero).astype(np.int8), "_zero_point": zero}


def by_block(weight):
    rows, columns = -(-weight.shape[0] // 16), -(-weight.shape[1] // 8)
    scale = np.random.default_rng(0).uniform(0.01, 0.02, (rows, columns)).astype(np.float32)
    wide = np.repeat(np.repeat(scale, 16, 0), 8, 1)[: weight.shape[0], : weight.shape[1]]
    return {"": float8(weight, wide), "_scale_inv": scale}


def by_group(weight):
    groups = weight.reshape(len(weight), -1, 4)
    scale = np.abs(groups).max(axis=2).astype(np.float32) / 127
    return {"": np.round(groups / scale[..., None]).astype(np.int8).reshape(weight.shape), "_scale": scale}


def by_exponent(weight):
    """Blocks of 16 rows and 8 columns whose scales are powers of two, stored as exponents alone."""
    scale = by_block(weight)["_scale_inv"]
    scale = np.exp2(np.round(np.log2(scale))).astype(ml_dtypes.float8_e8m0fnu)
    wide = np.repeat(np.repeat(scale.astype(np.float32), 16, 0), 8, 1)[: weight.shape[0], : weight.shape[1]]
    return {"": float8(weight, wide), "_scale_inv": scale}


def dequantised(tensors, name):
    """A plain loop, number by number."""
    weight = tensors[name].astype(np.float64)
    scale = tensors.get(f"{name}_scale", tensors.get(f"{name}_scale_inv")).astype(np.float64)
    zero = tensors.get(f"{name}_zero_point")
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            if scale.size == 1:
                factor, offset = scale.reshape(()), 0.0
            elif scale.shape[0] == len(weight) and scale.shape[1] > 1:
                factor, offset = scale[row, column // 4], 0.0
            elif scale.shape[1] == 1:
                factor, offset = scale[row, 0], 0.0 if zero is None else float(zero[row, 0])
            else:
                factor, offset = scale[row // 16, column // 8], 0.0
            result[row, column] = (weight[row, column] - offset) * factor
    return result


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (by_row, {"quantization_config": COMPRESSED}),
        (by_row, {"compression_config": COMPRESSED}),
        (by_row_with_zero, {"quantization_config": COMPRESSED}),
        (by_group, {"quantization_config": COMPRESSED}),
        (by_block, {"quantization_config": BLOCKS}),
        (by_exponent, {"quantization_config": BLOCKS}),
        (lambda weight: {k: v for k, v in by_tensor(weight).items() if k != "_input"}, {"quantization_config": BLOCKS}),
    ],
)
def test_8_bit_weights_with_scales_are_dequantised(change, config, directory, tmp_path):
    tensors = rewrite(directory, change, config)
    model = load_model(str(directory))
    for layer in ("0", "1"):
        for part, role, name in (("attn", "q", "self_attn.q_proj"), ("mlp", "d", "mlp.down_proj")):
            expected = dequantised(tensors, f"model.layers.{layer}.{name}.weight")
            found = np.asarray(model.params["layers"][layer][part][role]["kernel"])
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    saved = json.loads((save_model(model, tmp_path / "saved") / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & set(saved)


@pytest.mark.parametrize("config", [None, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}])
def test_scales_of_activations_are_not_needed(config, directory):
    def change(weight):
        activations = {".input_scale": np.ones(1, np.float32), ".input_scale_ub": np.ones(1, np.float32)}
        return {name: tensor for name, tensor in by_tensor(weight).items() if name != "_input"} | activations

    tensors = rewrite(directory, change, config)
    for name in [name for name in tensors if ".weight.input" in name]:
        tensors[name.replace(".weight.", ".")] = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    found = np.asarray(load_model(str(directory)).params["layers"]["0"]["attn"]["q"]["kernel"])
    expected = dequantised(tensors, "model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_float8_without_scales_is_read_as_it_is(directory, caplog):
    tensors = rewrite(directory, lambda weight: {"": weight.astype(ml_dtypes.float8_e5m2)}, None)
    with open_source(str(directory)):
        assert "has float8 weights without scales; they are read unscaled" in caplog.text
    found = np.asarray(load_model(str(directory)).params["layers"]["0"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(found, tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32))


REFUSED = {
    "GPTQ 4-bit": (
        lambda w: {"q": 0, "": 0} and {".qweight": np.zeros((2, 3), np.int32), ".scales": np.ones(3, np.float32)},
        {"quant_method": "gptq", "bits": 4},
    ),
    "AWQ": (lambda w: {".qweight": np.zeros((2, 3), np.int32)}, {"quant_method": "awq"}),
    "GPTQ or AWQ": (lambda w: {".qzeros": np.zeros((2, 3), np.int32)}, None),
    "bitsandbytes 8-bit": (
        lambda w: {"": w.astype(np.int8), ".SCB": np.ones(len(w), np.float32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "bitsandbytes 4-bit": (lambda w: {"": np.zeros((9, 1), np.uint8), ".absmax": np.ones(2, np.float32)}, None),
    "MXFP4": (lambda w: {"_blocks": np.zeros((2, 2), np.uint8)}, {"quant_method": "mxfp4"}),
    "HQQ": (lambda w: {".W_q": np.zeros((2, 2), np.uint8)}, {"quant_method": "hqq"}),
    "EXL2 or EXL3": (lambda w: {".trellis": np.zeros((2, 2), np.int16)}, None),
    "compressed-tensors packed": (lambda w: {"_packed": np.zeros((2, 2), np.int32)}, None),
    "compressed-tensors": (by_row, {"quant_method": "compressed-tensors"}),  # and does not say how
    "compressed-tensors mxfp8-quantized": (
        lambda w: {"": w.astype(ml_dtypes.float8_e4m3fn), "_scale": np.full((len(w), 2), 127, np.uint8)},
        {**COMPRESSED, "format": "mxfp8-quantized"},
    ),
    "compressed-tensors int-quantized": (  # with reordered columns
        lambda w: by_row(w) | {"_g_idx": np.zeros(w.shape[1], np.int32)},
        {**COMPRESSED, "format": "int-quantized"},
    ),
    "compressed-tensors float-quantized": (
        lambda w: {"": w},
        {**COMPRESSED, "format": "float-quantized", "transform_config": {"config_groups": {"R1": {}}}},
    ),
    "ModelOpt NVFP4": (
        lambda w: {"": np.zeros((9, 2), np.uint8), "_scale": np.ones((9, 1), ml_dtypes.float8_e4m3fn)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "torchao": (lambda w: {":_data": w.astype(np.int8)}, {"quant_method": "torchao"}),
    "MLX 4-bit": (lambda w: {"": np.zeros((9, 2), np.uint32)}, {"group_size": 64, "bits": 4}),
    "quanto": (lambda w: {"": w.astype(np.int8)}, {"quant_method": "quanto"}),
    "weights of type I8": (lambda w: {"": w.astype(np.int8)}, None),
    "weights of type I32": (lambda w: {"": w.astype(np.int32)}, None),
    "FP8": (lambda w: {"": w.astype(ml_dtypes.float8_e4m3fn)}, {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_its_name(name, directory):
    change, settings = REFUSED[name]
    rewrite(directory, change, None if settings is None else {"quantization_config": settings})
    with pytest.raises(UsageError, match=rf"this is a quantised checkpoint \({re.escape(name)}\)"):
        load_model(str(directory))


def test_scales_that_do_not_fit_are_refused(directory):
    rewrite(
        directory, lambda w: by_row(w) | {"_scale": np.ones((7, 1), np.float32)}, {"quantization_config": COMPRESSED}
    )
    with pytest.raises(UsageError, match="the scales of tensor"):
        load_model(str(directory))


def test_a_config_left_over_from_quantisation_does_no_harm(directory):
    before = load_model(str(directory)).params["layers"]["0"]["attn"]["q"]["kernel"]
    rewrite(
        directory, lambda w: {"": w}, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    )
    np.testing.assert_array_equal(load_model(str(directory)).params["layers"]["0"]["attn"]["q"]["kernel"], before)


# --- numbers that are none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_used(value, dtype, tmp_path, capsys):
    directory = save_model(tiny_model(), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    damaged = tensors["model.layers.1.mlp.up_proj.weight"].astype(dtype)
    damaged[3, 4:6] = value
    save_file(
        tensors | {"model.layers.1.mlp.up_proj.weight": damaged}, directory / "model.safetensors", {"format": "pt"}
    )
    text = tmp_path / "text.txt"
    text.write_text("some text " * 50)
    commands = [
        ["evaluate", str(directory), "--text", str(text)],
        ["convert", str(directory), "--method", "svd", "--text", str(text), "--out", str(tmp_path / "out")],
        ["generate", str(directory), "--prompt", "a"],
        ["export", str(directory), "--to", "hf", "--out", str(tmp_path / "out")],
    ]
    for command in commands:
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert "tensor 'model.layers.1.mlp.up_proj.weight' of model has 2 numbers that are NaN or infinite" in error


def test_numbers_too_large_for_a_type_are_not_called_damage(tmp_path):
    model = tiny_model()
    model.params["norm"]["scale"] = model.params["norm"]["scale"].at[0].set(1e6)
    directory = str(save_model(model, tmp_path / "model"))
    with pytest.raises(UsageError, match="too large for float16; load it in bfloat16 or float32"):
        load_model(directory, dtype="float16")
    load_model(directory, dtype="bfloat16")
    model.params["norm"]["scale"] = model.params["norm"]["scale"].at[0].set(3.4e38)
    save_model(model, directory, overwrite=True)
    with pytest.raises(UsageError, match="too large for bfloat16; load it in float32"):
        load_model(directory, dtype="bfloat16")
    with open_source(directory) as source, pytest.raises(UsageError, match="too large for bfloat16; choose float32"):
        export_huggingface(source, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
