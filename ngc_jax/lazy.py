"""Public names that are imported on first use (PEP 562), and the extra to install where that fails."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ngc_jax.errors import UsageError

# Packages that only some of the library needs, and the extra that brings them.
_EXTRAS = {
    "PIL": "vision",
    "datasets": "train",
    "grain": "train",
    "lm_eval": "eval",
    "orbax": "train",
    "tensorboardX": "train",
    "matplotlib": "report",
    "math_verify": "eval",
}


def missing_extra(error: ImportError) -> str | None:
    """What to install where a package of an extra is missing; None if it is another package.

    Example:
        >>> missing_extra(ModuleNotFoundError(name="matplotlib.figure"))
        "needs matplotlib, which is not installed; pip install 'ngc-jax[report]'"
    """
    package = (error.name or "").split(".")[0]
    return f"needs {install_advice(package)}" if package in _EXTRAS else None


def install_advice(package: str) -> str:
    """The end of a message about a package that is not installed.

    Example:
        >>> install_advice("math_verify")
        "math_verify, which is not installed; pip install 'ngc-jax[eval]'"
    """
    what = f"'ngc-jax[{_EXTRAS[package]}]'" if package in _EXTRAS else package
    return f"{package}, which is not installed; pip install {what}"


def require(package: str) -> None:
    """Import a package of an extra now, so that what needs it does not fail when the work is done.

    Raises:
        ModuleNotFoundError: If it is not installed; `missing_extra` says what to do.
    """
    importlib.import_module(package)


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Imports within need a package, without which the rest of the library works.

    Args:
        package: Its name.
        what: What it is needed for, the subject of the message.

    Raises:
        UsageError: If it is not installed.

    Example:
        >>> with needs("fitz", "this page"):
        ...     raise ModuleNotFoundError(name="fitz.utils")
        Traceback (most recent call last):
        ngc_jax.errors.UsageError: this page needs the package fitz, which is not installed; run 'pip install fitz'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise UsageError(
            f"{what} needs the package {package}, which is not installed; run 'pip install {package}'"
        ) from None


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
        try:
            return getattr(importlib.import_module(places[name]), name)
        except ModuleNotFoundError as error:
            advice = missing_extra(error)
            if advice is None:
                raise
            raise ModuleNotFoundError(f"{package}.{name} {advice}", name=error.name) from None

    return get, lambda: sorted(places)
