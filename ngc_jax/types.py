"""Types that all packages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# A tree of parameters: nested mappings of arrays, as `flax.linen.Module.init` returns them under "params".
Params = Mapping[str, Any]
# A callback for progress: the name of a stage, how many of its parts are done, and how many there are.
Progress = Callable[[str, int, int], None]
