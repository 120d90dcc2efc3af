"""Check that options from a file or a flag have the types of their fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}


def check_field_types(options: Any) -> None:
    """Compare the values of a dataclass with the types of its fields; a whole number is a number, true is not.

    Raises:
        UsageError: If a value has another type.
    """
    hints = typing.get_type_hints(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if not _fits(value, hints[field.name]):
            shown = ascii(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise UsageError(f"{field.name} is {shown}; expected {_words(hints[field.name])}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(key, parts[0]) for key in value)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, parts)))
    if origin in (list, Sequence):
        return f"a list, each {_words(parts[0])}"
    return "a mapping" if origin is dict else _WORDS.get(hint, "options of a source")
