"""Derives the Hugging Face config.json from a GGUF file's metadata."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.families import family_of, gguf_families
from ngc_jax.models.gguf.file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"

# Blocks that may have biases, by GGUF's names.
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
# The id that files store for an absent token: -1, possibly as an unsigned number.
NO_TOKEN = (-1, 2**32 - 1)


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """Synthesises the config.json dict of the model in a GGUF file.

    Rotary settings are given as `rope_theta` and `rope_scaling`, which every version of transformers reads. A
    tensor of rotary factors becomes rope_scaling of type "llama3" when its factors follow that rule, else
    {"rope_type": "explicit", "factors": [...]}: one factor per pair of dimensions that divides its frequency.

    Raises:
        UsageError: the architecture is not supported, or metadata is missing or invalid.
    """
    keys = _Keys(file)
    family = gguf_families()[keys.arch]
    assert family.gguf is not None
    n_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // n_heads)
    _refuse_unsupported(keys, head_dim, partial=family.gguf.partial_rotary)
    vocab_size, hidden_size = keys.tensor_shape("token_embd.weight", 2)
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": _layers(keys),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        family.eps: keys.real(family.gguf.eps),
        "rope_theta": keys.real("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": keys.token_id("bos", vocab_size),
        "eos_token_id": keys.token_id("eos", vocab_size),
        "dtype": "float32",
    }
    if family.gguf.partial_rotary:
        config["partial_rotary_factor"] = keys.integer("rope.dimension_count", head_dim) / head_dim
    config["rope_scaling"] = _rope_scaling(keys, head_dim, config["rope_theta"])
    return config | dict(family.gguf.settings(keys, config, _biased(file) & {*ATTENTION, *MLP}))


def biased_parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """GGUF's names of the blocks that have biases in every layer of the model of a synthesised config."""
    qkv, o, mlp = family_of(config["model_type"]).biases(config)
    return (*(ATTENTION[:3] if qkv else ()), *(ATTENTION[3:] if o else ()), *(MLP if mlp else ()))


def _biased(file: GgufFile) -> set[str]:
    """Which blocks have a bias in any layer."""
    parts = (name.split(".") for name in file.tensors)
    return {part[2] for part in parts if len(part) == 4 and part[0] == "blk" and part[3] == "bias"}


def rope_scaling_from_factors(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Recovers Llama 3's rotary scaling from the factors by which it divides the frequencies.

    Llama 3 does not change waves shorter than L/high, divides the frequency of waves longer than L/low by F, and
    interpolates in between: 1/factor = (1 - s)/F + s with s = (L/wavelength - low)/(high - low). So s is a straight
    line in 1/wavelength, and its two coefficients determine low/L and high/L; low = 1 is our choice, as in all
    published models.

    Args:
        factors: (H/2,) divisors, fastest pair of dimensions first.
        theta: the rotary base.

    Returns:
        A rope_scaling dict of type "llama3", or of type "explicit" if no such rule gives these factors.
    """
    divisors = factors.astype(np.float64)
    explicit = {"rope_type": "explicit", "factors": [_shortest(factor) for factor in divisors]}
    largest = divisors.max()
    between = (divisors > 1 + 1e-6) & (divisors < largest * (1 - 1e-6))
    if not np.isfinite(divisors).all() or divisors.min() <= 0 or between.sum() < 2:
        return explicit
    rotations = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)  # per token, 1/wavelength
    blend = (1 / divisors - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(rotations[between], blend[between], 1)
    if slope <= 0 or intercept >= 0:
        return explicit
    low, high = 1.0, float(f"{1 - 1 / intercept:.4g}")
    factor, length = float(f"{largest:.6g}"), round(slope * (high - low))
    kept = np.clip((length * rotations - low) / (high - low), 0, 1)
    if not np.allclose(kept + (1 - kept) / factor, 1 / divisors, rtol=1e-4, atol=0):
        return explicit
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


class _Keys:
    """Looks up the architecture's metadata keys; a missing or malformed one is a UsageError."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        kind = file.metadata.get("general.type", "model")
        if kind != "model":
            raise UsageError(f"{file.path}: holds {_brief(kind)} instead of a model; give the file of the model itself")
        self.arch = str(file.metadata.get("general.architecture"))
        if self.arch not in gguf_families():
            near = difflib.get_close_matches(self.arch, gguf_families(), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"{file.path}: architecture {self.arch!r} is not supported{hint}; "
                f"choose a model of one of {', '.join(gguf_families())}"
            )

    def error(self, key: str, problem: str) -> UsageError:
        return UsageError(
            f"{self.file.path}: metadata key {self.arch}.{key} {problem}; convert the model again, or choose another"
        )

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]  # one number per layer, all equal
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(key, f"is {_brief(value)}, expected a positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < _shortest(value) < math.inf:
            raise self.error(key, f"is {_brief(value)}, expected a positive number")
        return _shortest(value)

    def token_id(self, role: str, vocab_size: int) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        return value if usable else None

    def tensor_shape(self, name: str, n_dims: int) -> tuple[int, ...]:
        info = self.file.tensors.get(name)
        if info is None or len(info.shape) != n_dims:
            found = "is missing" if info is None else f"has shape {info.shape}"
            raise UsageError(
                f"{self.file.path}: tensor {name} {found}, expected {n_dims} dimension(s); choose another file"
            )
        return info.shape


def _shortest(value: float) -> float:
    """The shortest decimal that identifies a float32: what the author wrote, 1e-05 and not 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _brief(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _layers(keys: _Keys) -> int:
    n_layers = keys.integer("block_count")
    if not {f"blk.{n_layers - 1}.{part}.weight" for part in ("attn_q", "attn_qkv")} & keys.file.tensors.keys():
        raise keys.error("block_count", f"is {n_layers}, but the last layer's attn_q.weight is not in the file")
    return n_layers


def _refuse_unsupported(keys: _Keys, head_dim: int, *, partial: bool) -> None:
    if keys.get("expert_count"):
        raise keys.error("expert_count", "is set, but mixtures of experts are not supported")
    if head_dim < 2 or head_dim % 2:
        raise keys.error("attention.key_length", f"makes the head size {head_dim}, expected an even number")
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"differs from the head size {head_dim}, which is not supported")


def _rope_scaling(keys: _Keys, head_dim: int, theta: float) -> dict[str, Any] | None:
    if ROPE_FACTORS in keys.file.tensors:
        (n_factors,) = keys.tensor_shape(ROPE_FACTORS, 1)
        if n_factors != head_dim // 2:
            raise UsageError(
                f"{keys.file.path}: tensor {ROPE_FACTORS} has {n_factors} factors, expected {head_dim // 2}, "
                "one per pair of a head's dimensions; convert the model again"
            )
        return rope_scaling_from_factors(keys.file.read(ROPE_FACTORS), theta)
    # As in llama.cpp: a factor alone is linear scaling, and 0 means none.
    kind, factor = keys.get("rope.scaling.type") or "linear", 1.0
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        if keys.get(key) not in (None, 0):
            factor = keys.real(key)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(keys, factor)
    raise keys.error("rope.scaling.type", f"is {_brief(kind)}, expected none, linear or yarn")


def _yarn(keys: _Keys, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        # The default of llama.cpp.
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if keys.get(f"rope.scaling.{theirs}") is not None:
            scaling[ours] = keys.real(f"rope.scaling.{theirs}")
    for key in ("attn_factor", "yarn_attn_factor"):
        if keys.real(f"rope.scaling.{key}", 1.0) != 1.0:
            raise keys.error(f"rope.scaling.{key}", "is not 1, which is not supported")
    return scaling
