"""Quantised safetensors checkpoints: dequantise the supported formats, and name the others.

Supported are 8-bit weights with separate scales: float8 in blocks, rows or whole (`weight_scale_inv` of fp8
checkpoints, `weight_scale` of compressed-tensors and others), and int8 of compressed-tensors. Packed formats are
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.keys import is_ignored

# The entries of config.json that describe a quantisation; the last is MLX's.
ENTRIES = ("quantization_config", "compression_config", "quantization")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
# Types of scales that are plain numbers. Bytes can be exponents as well as half of a two-level scale.
_SCALE_TYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
# Suffixes of a weight's scales and zero point, and of tensors that only serve quantised activations.
_SCALES = ("_scale", "_scale_inv")
_ZERO = "_zero_point"
_ACTIVATIONS = re.compile(r"\.(input|output|k|v|q)_(scale|zero_point|global_scale|scale_ub)$|\.activation_scale$")
# Tensors that only packed formats have, and the format's name where config.json has none.
_PACKED = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.SCB$": "bitsandbytes 8-bit",
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.": "bitsandbytes 4-bit",
    r"\.weight_packed$": "compressed-tensors packed",
    r"_blocks$": "MXFP4",
    r"\.(W_q|W_q_shape)$": "HQQ",
    r"\.(q_weight|q_scale|trellis)$": "EXL2 or EXL3",
    r"\.codes$|\.codebooks$": "AQLM",
    r"\._data$": "quanto",
}
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM"}
_NAMES |= {"exl2": "EXL2", "exl3": "EXL3", "fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8", "eetq": "EETQ", "quark": "Quark"}
_NAMES |= {"modelopt": "ModelOpt", "torchao": "torchao", "bitnet": "BitNet", "vptq": "VPTQ", "auto-round": "AutoRound"}


@dataclass(frozen=True)
class Scales:
    """How one weight is dequantised.

    Attributes:
        scale: Tensor of the scales.
        zero: Tensor of the zero points; None where zero is 0.
        block: Rows and columns that share a scale; None where the shapes determine it.
    """

    scale: str
    zero: str | None
    block: tuple[int, int] | None


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation settings in config.json, at any of their known places."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for name in ENTRIES:
            if isinstance(place.get(name), Mapping):
                found: Mapping[str, Any] = place[name]
                return found
    return None


def find_scales(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> tuple[dict[str, Scales], set[str]]:
    """The scales of every quantised weight.

    Args:
        config: config.json.
        tensors: Type, as safetensors calls it, and shape of every tensor.
        where: The model, for messages.

    Returns:
        By name of a weight, its scales; and the names of all tensors that are not weights of the model.

    Raises:
        UsageError: If weights are stored in an unsupported format, which the message names.
    """
    settings = quantisation_config(config)
    rotations = None if settings is None else settings.get("transform_config")
    if isinstance(rotations, Mapping) and rotations.get("config_groups"):
        raise _refusal(where, str(_called(settings)), "its transform_config rotates weights and activations")
    for name in tensors:
        for pattern, kind in _PACKED.items():
            if re.search(pattern, name):
                raise _refusal(where, _called(settings) or kind, f"it has tensors such as {name!r}")
    weights = {
        name: kind
        for name, (kind, _) in tensors.items()
        if kind in (*_FLOAT8, *_INTEGERS) and _is_weight(name) and not is_ignored(name)
    }
    scales: dict[str, Scales] = {}
    helpers: set[str] = set()
    for name, kind in weights.items():
        found = [name + suffix for suffix in _SCALES if name + suffix in tensors]
        if not found:
            if kind in _FLOAT8 and settings is None:
                continue  # float8 without scales, the result of a plain cast
            raise _refusal(where, _called(settings) or f"weights of type {kind}", f"{name!r} has no scales beside it")
        if kind not in (*_FLOAT8, "I8"):
            raise _refusal(where, _called(settings) or f"weights of type {kind}", f"{name!r} is of type {kind}")
        if tensors[found[0]][0] not in _SCALE_TYPES:
            why = f"the scales of {name!r} are of type {tensors[found[0]][0]}"
            raise _refusal(where, _called(settings) or f"weights of type {kind}", why)
        _check_described(settings, where, name)
        zero = name + _ZERO if name + _ZERO in tensors else None
        scales[name] = Scales(found[0], zero, _block(settings))
        helpers |= {found[0], *([] if zero is None else [zero])}
    if scales or settings is not None:
        helpers |= {name for name in tensors if _ACTIVATIONS.search(name)}
    if settings is not None:
        for name in tensors:
            if not (_is_weight(name) or name in helpers or is_ignored(name)):
                raise _refusal(where, str(_called(settings)), f"it has tensors such as {name!r}")
    return scales, helpers


def has_bare_float8(tensors: Mapping[str, tuple[str, tuple[int, ...]]], scales: Mapping[str, Scales]) -> bool:
    """Whether weights are in float8 without scales, the result of a plain cast; arguments as of `find_scales`."""
    return any(kind in _FLOAT8 and _is_weight(name) and name not in scales for name, (kind, _) in tensors.items())


def dequantise(
    weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, block: tuple[int, int] | None, name: str
) -> np.ndarray:
    """(q - zero) · scale in float32.

    Args:
        weight: q (J, I).
        scale: One number, (J,), (J, 1), or one for each block of rows and columns.
        zero: Of the scale's shape, or None.
        block: Rows and columns of a block; None to divide the weight evenly.
        name: The tensor, for messages.

    Raises:
        UsageError: If the shapes do not fit.
    """
    result: np.ndarray = weight.astype(np.float32)
    if zero is not None:
        result -= _spread(zero.astype(np.float32), weight.shape, block, name)
    result *= _spread(scale.astype(np.float32), weight.shape, block, name)
    return result


def _spread(
    values: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] | None, name: str
) -> np.ndarray | np.float32:
    if values.size == 1:
        return np.float32(values.reshape(()))
    rows, columns = shape if len(shape) == 2 else (shape[0], 1)
    values = values.reshape(values.shape[0], -1)
    whole = block is not None or (rows % values.shape[0] == 0 and columns % values.shape[1] == 0)
    heights = block[0] if block is not None and values.shape[0] != rows else -(-rows // values.shape[0])
    widths = block[1] if block is not None and values.shape[1] not in (1, columns) else -(-columns // values.shape[1])
    if not whole or values.shape != (-(-rows // heights), -(-columns // widths)):
        raise UsageError(
            f"the scales of tensor {name!r} are of shape {values.shape}, which does not fit its shape {shape}; get the "
            "checkpoint again"
        )
    spread: np.ndarray = np.repeat(values, heights, axis=0)[:rows]
    return spread if values.shape[1] == 1 else np.repeat(spread, widths, axis=1)[:, :columns]


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _check_described(settings: Mapping[str, Any] | None, where: str, name: str) -> None:
    """compressed-tensors says in config_groups how its weights are quantised."""
    if settings is None or settings.get("quant_method", "compressed-tensors") != "compressed-tensors":
        return
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refusal(where, "compressed-tensors", f"its quantization_config does not say how {name!r} is quantised")


def _block(settings: Mapping[str, Any] | None) -> tuple[int, int] | None:
    if settings is None:
        return None
    candidates = [settings.get("weight_block_size")]
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            candidates.append(weights.get("block_structure"))
            size = weights.get("group_size")
            candidates.append([1, size] if isinstance(size, int) and size > 0 else None)
    for found in candidates:
        if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
            return found[0], found[1]
    return None


def _called(settings: Mapping[str, Any] | None) -> str | None:
    """The format's name, with its bits where they are given."""
    if settings is None:
        return None
    mlx = "bits" in settings and "group_size" in settings
    method = str(settings.get("quant_method", "MLX" if mlx else "compressed-tensors"))
    detail = settings.get("quant_algo", settings.get("format") if method == "compressed-tensors" else None)
    bits = settings.get("bits", settings.get("w_bit"))
    for key, number in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = number if settings.get(key) else bits
    name = _NAMES.get(method.lower(), method)
    return name + (f" {bits}-bit" if isinstance(bits, int) else f" {detail}" if isinstance(detail, str) else "")


def _refusal(where: str, kind: str, why: str) -> UsageError:
    return UsageError(
        f"{where}: this is a quantised checkpoint ({kind}), which cannot be read: {why}; use the unquantised model, or "
        "a GGUF file"
    )
