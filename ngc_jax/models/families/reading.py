"""Read settings from config.json: numbers, windows and rotary embeddings, each with a message that names the entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.rope import Rope, rope_from_hf

SLIDING, FULL = "sliding_attention", "full_attention"
# Far above every existing model, and far below what would fill all memory before an error.
_LARGEST = {"num_hidden_layers": 4096, "ngc_iterations": 4096, "head_dim": 65_536}
_LARGEST |= {"max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1}
_LARGEST_SIZE = 2**24


def number(hf: Mapping[str, Any], name: str, kind: type, default: float | None = None) -> Any:
    """A positive number; `default` if it is null or missing.

    Args:
        hf: config.json.
        name: Of the entry.
        kind: int or float.
        default: None if the entry is required.

    Raises:
        UsageError: If it is no positive number of that kind.
    """
    value = hf.get(name)
    value = default if value is None else value
    most: float = _LARGEST.get(name, _LARGEST_SIZE) if kind is int else 1e18
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    if not usable or value != kind(value):
        what = "whole number" if kind is int else "number"
        raise UsageError(f"{name} in config.json is {brief(value)}; expected a positive {what} up to {most:,}")
    return kind(value)


def optional(hf: Mapping[str, Any], name: str) -> float | None:
    """A positive number, or None if it is null or missing."""
    return None if hf.get(name) is None else float(number(hf, name, float))


def experts(
    hf: Mapping[str, Any], count: int, width: str, normalised: bool, sparse: tuple[bool, ...] | None = None
) -> dict[str, Any] | None:
    """The fields of `config.Experts`; None if no layer has any.

    Args:
        hf: config.json.
        count: The number of experts where config.json is silent; transformers 5 writes it by either of two names.
        width: The entry with the hidden neurons of each.
        normalised: A token's weights sum to one.
        sparse: By layer, whether it has experts; None for all.
    """
    layers = (True,) * hf["num_hidden_layers"] if sparse is None else sparse
    if not any(layers):
        return None
    return {
        "count": number(hf, "num_experts" if hf.get("num_experts") is not None else "num_local_experts", int, count),
        "per_token": number(hf, "num_experts_per_tok", int),
        "width": number(hf, width, int),
        "layers": layers,
        "normalised": normalised,
    }


def brief(value: Any, most: int = 80) -> str:
    """A value as text of limited length, for messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number with too many digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def layer_types(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...] | None:
    """Which layers attend to a sliding window only, by `layer_types`; None if config.json has no such entry.

    Raises:
        UsageError: If it is not one known type for every layer.
    """
    types = hf.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list | tuple):
        raise UsageError(f"layer_types in config.json is {brief(types)}; expected a list with a type for each layer")
    kinds = {str(kind) for kind in types}
    if len(types) != layers or kinds - {SLIDING, FULL}:
        raise UsageError(
            f"layer_types in config.json has {len(types)} entries of {', '.join(sorted(kinds))}; "
            f"expected {layers} of {SLIDING} or {FULL}"
        )
    return tuple(kind == SLIDING for kind in types)


def all_but_every(period: int, layers: int) -> tuple[bool, ...]:
    """Every layer but each `period`-th."""
    return tuple(bool((layer + 1) % period) for layer in range(layers))


def windows(hf: Mapping[str, Any], sliding: tuple[bool, ...]) -> tuple[int | None, ...]:
    """By layer, the number of tokens that it attends to; None for all."""
    window = number(hf, "sliding_window", int) if any(sliding) else None
    return tuple(window if is_sliding else None for is_sliding in sliding)


def rope(
    hf: Mapping[str, Any],
    kind: str | None = None,
    theta: float = 10_000.0,
    theta_entry: str = "rope_theta",
    share: float | None = None,
) -> Rope:
    """The rotary embedding of all layers, or of one kind of layers.

    Args:
        hf: config.json, of transformers 5 (`rope_parameters`) or earlier (`rope_theta`, `rope_scaling`).
        kind: `SLIDING` or `FULL`, where each kind may have an entry of its own; an entry for no kind is that of `FULL`.
        theta: The base where config.json names none.
        theta_entry: The entry at the top of config.json that names the base.
        share: The rotated share of a head where config.json names none; None for a family that rotates whole heads.
    """
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if kind is not None and isinstance(parameters, Mapping):
        by_kind = parameters if {SLIDING, FULL} & set(parameters) else {FULL: parameters}
        parameters = by_kind.get(kind) or {}
    base, length = number(hf, theta_entry, float, theta), number(hf, "max_position_embeddings", int)
    return rope_from_hf(parameters, base, length, share and number(hf, "partial_rotary_factor", float, share))
