"""Public names that are imported on first use (PEP 562), so that `import ngc_jax` does not import JAX."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names are defined in its modules.

    Args:
        package: Its name.
        places: By public name, the module that defines it.

    Example:
        >>> get, _ = lazy_names("json", {"JSONDecoder": "json.decoder"})
        >>> get("JSONDecoder").__module__
        'json.decoder'
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(places[name]), name)

    return get, lambda: sorted(places)
