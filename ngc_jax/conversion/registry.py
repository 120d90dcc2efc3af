"""The registry of all passes and their options, from which the command line and named methods are made."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from typing import Any

from docstring_parser import parse as parse_docstring

from ngc_jax.conversion import passes
from ngc_jax.conversion.chains import REGISTERED, Pass, option_names
from ngc_jax.errors import UsageError


def all_passes() -> list[type[Pass]]:
    """All pass classes, in their order in a chain made from options.

    Raises:
        UsageError: If a pass follows one that does not exist.
    """
    for module in pkgutil.iter_modules(passes.__path__):
        importlib.import_module(f"{passes.__name__}.{module.name}")
    order: list[type[Pass]] = []

    def add_followers(of: str | None) -> None:
        for kind, after in REGISTERED.values():
            if after == of:
                order.append(kind)
                add_followers(kind.name)

    add_followers(None)
    lost = [(kind.name, after) for kind, after in REGISTERED.values() if kind not in order]
    if lost:
        (name, after), names = lost[0], ", ".join(kind.name for kind in order)
        raise UsageError(f"pass {name!r} is to follow {after!r}, which is no pass; expected one of {names}")
    return order


def option_types() -> dict[str, Any]:
    """The type of every option of every pass."""
    return {name: typing.get_type_hints(kind)[name] for kind in all_passes() for name in option_names(kind)}


def option_docs() -> dict[str, str]:
    """The description of every option of every pass, from the docstrings."""
    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for kind in all_passes()
        for parameter in parse_docstring(kind.__doc__ or "").params
        if parameter.arg_name in option_names(kind)
    }
