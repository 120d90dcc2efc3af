"""The examples in docstrings run, but for lines that say that they need a download; every public name has one."""

import doctest
import functools
import importlib
import inspect
from pathlib import Path

import pytest

from ngc_jax import convert
from tests.tiny import random_tokens, tiny_model

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "ngc_jax").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
# Packages whose public names are in their `__all__`.
PACKAGES = ("ngc_jax", "ngc_jax.conversion", "ngc_jax.exporting", "ngc_jax.stability")
PUBLIC = sorted({(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__})


@functools.cache
def given():
    """What every example has: a tiny model, a text, token ids (64,), and a compact model of the tiny one."""
    model = tiny_model()
    text = "Groups exchange signals. " * 40
    return {"model": model, "text": text, "tokens": random_tokens(64), "compact": convert(model, "svd", keep=0.6)}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(module), extraglobs=given(), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def has_example(found):
    return any(
        not example.options.get(doctest.SKIP)
        for example in doctest.DocTestParser().get_examples(inspect.getdoc(found) or "")
    )


@functools.cache
def results():
    """The classes of what public functions with an example return: the example shows them."""
    functions = (getattr(importlib.import_module(package), name) for package, name in PUBLIC)
    shown = [one for one in functions if inspect.isfunction(one) and has_example(one)]
    return {str(one.__annotations__.get("return")) for one in shown}


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_name_has_an_example_that_runs(package, name):
    found = getattr(importlib.import_module(package), name)
    if isinstance(found, dict | tuple):
        pytest.skip("a table")
    assert has_example(found) or found.__name__ in results()
