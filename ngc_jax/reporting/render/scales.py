"""Axes: positions of values, ranges of axes, and their round labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

# The asinh scale is linear up to about this value.
ASINH_WIDTH = 0.05


def scaled(value: float, scale: str) -> float:
    """The position of a value on an axis, up to the axis's own shift and stretch."""
    if scale == "log":
        return math.log(value)
    return math.asinh(value / ASINH_WIDTH) if scale == "asinh" else value


def padded_range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the lowest to the highest value, with a margin; never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    air = margin * (high - low)
    return low - air, high + air


def scale_ticks(scale: str, low: float, high: float) -> list[float]:
    """Round numbers on an axis from `low` to `high` in its own scale."""
    if scale == "log":
        return _log_ticks(math.exp(low), math.exp(high))
    if scale == "asinh":
        ends = ASINH_WIDTH * math.sinh(low), ASINH_WIDTH * math.sinh(high)
        sizes = [0.1 * factor for factor in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)]
        # Every other one, if there would be many.
        sizes = sizes[1::2] if max(high, -low) > 5 else sizes
        return [tick for tick in (*(-size for size in reversed(sizes)), 0.0, *sizes) if ends[0] <= tick <= ends[1]]
    return ticks(low, high)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 2 to `most` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for the labels of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 8), (1, 2, 5), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= 8:
            break
    # Within a small factor there may be no such number.
    return found if len(found) > 1 else ticks(low, high)
