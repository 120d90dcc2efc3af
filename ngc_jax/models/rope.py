"""Rotary position embeddings: their inverse frequencies, read from every form of config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "explicit")


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding with its length scaling.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        rope_type: One of `ROPE_TYPES`; `explicit` divides each frequency by its own factor.
        factor: Length extension factor of `linear`, `llama3` and `yarn`.
        low_freq_factor: `llama3`: wavelengths above original_length / low_freq_factor are scaled fully.
        high_freq_factor: `llama3`: wavelengths below original_length / high_freq_factor are not scaled.
        original_length: Context length of pretraining, in tokens (`llama3`, `yarn`).
        beta_fast: `yarn`: rotations over original_length at and above which nothing is interpolated.
        beta_slow: `yarn`: rotations at and below which everything is interpolated.
        truncate: `yarn`: whether the bounds of the ramp are rounded to whole dimensions.
        attention_factor: Multiplies both cosine and sine.
        factors: `explicit`: one divisor for each pair of dimensions.
        share: Of a head's dimensions that are rotated: the first ones.
        interleaved: Pairs are neighbours, not dimensions half of the rotated ones apart.
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()
    share: float = 1.0
    interleaved: bool = False

    def rotated(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated: E."""
        return int(head_dim * self.share)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angles per position.

        Sources: RoPE (arXiv 2104.09864), position interpolation (2306.15595), YaRN (2309.00071), Llama 3.1.

        Args:
            head_dim: Dimensions of a head, H.

        Returns:
            Radians per token, shape (E / 2,), float64.

        Raises:
            UsageError: If `explicit` factors do not have one entry per pair of dimensions.
        """
        head_dim = self.rotated(head_dim)
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain = self.theta**-exponent
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "llama3":
            rotations = self.original_length * plain / (2 * math.pi)
            keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            return keep * plain + (1 - keep) * plain / self.factor
        if self.rope_type == "yarn":
            low, high = (self._yarn_dimension(beta, head_dim) for beta in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
            return (1 - ramp) * plain + ramp * plain / self.factor
        if self.rope_type == "explicit":
            if len(self.factors) != head_dim // 2:
                raise UsageError(
                    f"rope has {len(self.factors)} explicit factors; expected {head_dim // 2}, one for two dimensions"
                )
            return plain / np.asarray(self.factors, np.float64)
        return plain

    def _yarn_dimension(self, rotations: float, head_dim: int) -> float:
        """Dimension whose angle makes `rotations` turns over the original length."""
        return head_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))


def rope_from_hf(parameters: Mapping[str, Any], theta: float, max_length: int, share: float | None = None) -> Rope:
    """Read one rope entry: `rope_parameters` (transformers 5) or `rope_scaling` (earlier).

    Args:
        parameters: The entry; may be empty.
        theta: Base if the entry has no `rope_theta`.
        max_length: The config's `max_position_embeddings`, in tokens.
        share: The rotated share of a head's dimensions if the entry has no `partial_rotary_factor`; None for an
            architecture that rotates all of them.

    Raises:
        UsageError: If the type is not supported, or one of its numbers is missing or invalid.
    """
    if not isinstance(parameters, Mapping):
        raise UsageError(f"rope_parameters in config.json is {parameters!r}; expected names and numbers")
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if kind not in ROPE_TYPES:
        raise UsageError(f"rope type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    if share is not None:
        share = _number(parameters, "partial_rotary_factor", share)
        if share > 1:
            raise UsageError(f"partial_rotary_factor of the rope in config.json is {share}; expected at most 1")
        whole = {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
        return dataclasses.replace(rope_from_hf(whole, theta, max_length), share=share)
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise UsageError("partial rotary embeddings are not supported; expected partial_rotary_factor 1.0")
    required = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor",),
        "explicit": ("factors",),
    }[kind]
    missing = [name for name in required if parameters.get(name) is None]
    if missing:
        raise UsageError(f"rope type {kind!r} lacks {', '.join(missing)}; add to rope_parameters in config.json")
    theta = _number(parameters, "rope_theta", theta)
    if kind == "default":
        return Rope(theta)
    if kind == "explicit":
        factors = tuple(float(factor) for factor in parameters["factors"])
        return Rope(theta, kind, factors=factors, attention_factor=_number(parameters, "attention_factor", 1.0))
    factor = _number(parameters, "factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    original_length = int(_number(parameters, "original_max_position_embeddings", max_length))
    if kind == "llama3":
        low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
        if low >= high:
            raise UsageError(f"rope has low_freq_factor {low} and high_freq_factor {high}; expected the first below")
        return Rope(theta, kind, factor, low, high, original_length)
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention_factor = _yarn_mscale(factor, 1.0)
    if mscale and mscale_all:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return Rope(
        theta,
        kind,
        factor,
        original_length=original_length,
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=_number(parameters, "attention_factor", attention_factor),
    )


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; `default` if it is null or missing."""
    value = parameters.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{name} of the rope in config.json is {value!r}; expected a positive number")
    return float(value)


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Temperature correction of YaRN (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
