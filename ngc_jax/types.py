"""Types that all packages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

# A tree of parameters: nested mappings of arrays, as `flax.linen.Module.init` returns them under "params".
Params = Mapping[str, Any]
# A callback for progress: the name of a stage, how many of its parts are done, and how many there are.
Progress = Callable[[str, int, int], None]
# Bits of a quantised number, and how many numbers share a scale.
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128]
