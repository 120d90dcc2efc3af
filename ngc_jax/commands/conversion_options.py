"""The options of a conversion as fields that commands inherit, derived from the passes and the methods."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.conversion.methods import METHODS, Recipe
from ngc_jax.conversion.registry import option_docs, option_types

_METHODS_OWN = "The method's own by default."


def _make() -> type:
    docs = {
        "method": "Conversion method.",
        "keep": "Keep ratio: stored over dense parameters of the grouped blocks, above 0 and at most 1.",
    }
    docs |= {name: f"{text} {_METHODS_OWN}" for name, text in option_docs().items()}
    fields: list[Any] = [("method", Literal[tuple(METHODS)], "ngc"), ("keep", float, 0.8)]
    fields += [(name, kind | None, None) for name, kind in option_types().items()]
    made = dataclasses.make_dataclass("ConversionOptions", fields, frozen=True, namespace={"__module__": __name__})
    lines = [f"    {name}: {text}" for name, text in docs.items()]
    made.__doc__ = "Options of a conversion.\n\nArgs:\n" + "\n".join(lines)
    return made


ConversionOptions: Any = _make()


def recipe_of(options: Any) -> Recipe:
    """The recipe for a command's options.

    Raises:
        UsageError: If they contradict each other.
    """
    return Recipe(options.method, keep=options.keep, **{name: getattr(options, name) for name in option_types()})


def flags_of(recipe: Recipe) -> list[str]:
    """The options of `ngc-jax convert` for a recipe."""
    flags = ["--method", recipe.method, "--keep", str(recipe.keep)]
    for name, value in recipe.options:
        flags += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    return flags
