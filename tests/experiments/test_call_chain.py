"""The call chain of modules made for the test."""

import sys
import types

from experiments.call_chain import chain_of

LOWER = """
def back(upper): upper.leaf()
def straight(upper): pass
"""
UPPER = """
def leaf(): pass
def run(): lower.straight(sys.modules[__name__]); lower.back(sys.modules[__name__])
def short(): lower.straight(None)
"""


def modules(monkeypatch):
    made = {name: types.ModuleType(f"ngc_jax.made_{name}") for name in ("lower", "upper")}
    for name, source in (("lower", LOWER), ("upper", UPPER)):
        monkeypatch.setitem(sys.modules, made[name].__name__, made[name])
        vars(made[name]).update(sys=sys, lower=made["lower"])
        exec(source, vars(made[name]))
    return made["upper"]


def test_modules_are_those_that_are_entered_and_returns_those_that_wait_below(monkeypatch):
    upper = modules(monkeypatch)
    chain = chain_of(upper.run, "leaf")
    assert chain.modules == ["ngc_jax.made_upper", "ngc_jax.made_lower"]
    assert chain.returns == ["ngc_jax.made_upper"]
    assert [function.rsplit(".", 1)[1] for function in chain.stack] == ["run", "back", "leaf"]
    chain = chain_of(upper.short, "leaf")
    assert (chain.returns, chain.stack) == ([], [])
