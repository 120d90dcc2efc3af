import dataclasses
from typing import ClassVar

import pytest

from ngc_jax.conversion import METHODS, Pass, Recipe, chain, factorise, propagate_errors, prune_neurons, remeasure
from ngc_jax.conversion.passes.propagate_errors import PropagateErrors
from ngc_jax.conversion.passes.prune_neurons import PruneNeurons
from ngc_jax.conversion.passes.remeasure import Remeasure
from ngc_jax.errors import UsageError
from ngc_jax.planning.candidates import AUTO
from tests.conversion.helpers import factorise_of


@pytest.mark.parametrize(
    ("levers", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; expected one of .*ngc"),
        ({"keep": 0.0}, "outside"),
        ({"keep": 1.0001}, "outside"),
        ({"keep": float("nan")}, "outside"),
        ({"rank": 0}, "rank 0 is too small"),
        ({"rank": -3}, "rank -3 is too small"),
        ({"rank": 4, "allocation": "loss"}, "leave out rank or allocation loss"),
        ({"rank": "full", "allocation": "svd_llm_v2"}, "leave out rank or allocation svd_llm_v2"),
        ({"rank_multiple": 0}, "rank multiple 0 is too small"),
        ({"method": "svd", "rank_multiple": 8}, "needs allocation 'loss'"),
        ({"rank": 16, "rank_multiple": 8}, "needs allocation 'loss'"),
        ({"rounds": -1}, "rounds -1 is below 0"),
        ({"method": "svd_llm", "rounds": 1}, "uses no gradients"),
        ({"method": "fwsvd", "rounds": 1}, "uses no gradients"),
        ({"method": "svd_llm", "sensitivities": True}, "add a round or leave them out"),
        ({"rounds": 0, "sensitivities": True}, "add a round or leave them out"),
        ({"topology": AUTO, "allocation": "uniform"}, "topology auto .* needs allocation 'loss'"),
        ({"topology": AUTO, "rank": 3}, "topology auto .* needs allocation 'loss'"),
        ({"method": "svd", "topology": AUTO}, "topology auto .* needs allocation 'loss'"),
        ({"kernel": "lifted", "lift": 9, "gauge": True}, "no gauge to fix"),
        ({"kernel": "riemannian", "rounds": 1}, "fitted once; leave out rounds"),
        ({"kernel": "lifted"}, "lift is 0|lift 0"),
        ({"kernel": "magic"}, "unknown kernel"),
        ({"lift": 8}, "no option 'lift'"),
        ({"kernel": "lifted", "lift": 9, "fit_steps": -1}, "below 0"),
        ({"topology": "qxk"}, "x"),
        ({"topology": "q-q-"}, "topology"),
    ],
)
def test_refusals(levers, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**levers)


def test_an_unknown_option_is_named():
    with pytest.raises(UsageError, match="there is no option 'with' of a conversion; expected one of keep_neurons, "):
        Recipe(**{"with": 3})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.3, 0.8, 1.0])
def test_what_is_left_out_is_the_method_s_own(method, keep):
    own = [one for one in METHODS[method](keep) if not one.is_off]
    assert list(Recipe(method, keep=keep).chain) == own
    assert Recipe(method, keep=keep).chain.method == method


def test_what_is_given_goes_before_the_method_s_own():
    recipe = Recipe("svd_llm", "qkv-o", allocation="loss", gauge=True, rank_multiple=4)
    expected = {"topology": "qkv-o", "allocation": "loss", "gauge": True, "rank_multiple": 4}
    assert expected.items() <= recipe.chain.options().items()
    assert [one.name for one in recipe.chain] == ["factorise"]
    assert not factorise_of(Recipe("ngc", gauge=False)).gauge
    assert Recipe("ngc").chain.find(Remeasure).sensitivities
    assert not Recipe("ngc", sensitivities=False).chain.find(Remeasure).sensitivities
    assert Recipe("ngc", rounds=0).chain.find(Remeasure) is None
    assert factorise_of(Recipe("ngc", rank=5)).allocation == "uniform"
    assert factorise_of(Recipe("ngc", rank=5, allocation="uniform")).allocation == "uniform"
    assert factorise_of(Recipe("ngc", AUTO)).topology == AUTO
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.keep = 0.5


def test_options_add_passes_and_drop_those_that_they_exclude():
    assert Recipe("ngc").chain.find(PropagateErrors) == propagate_errors(0.3)
    assert Recipe("ngc", "qkv-o").chain.find(PropagateErrors)
    assert Recipe("svd_llm").chain.find(PropagateErrors) is None
    assert Recipe("svd_llm", propagation=0.2).chain.find(PropagateErrors) == propagate_errors(0.2)
    assert Recipe("ngc", propagation=0).chain.find(PropagateErrors) is None
    for elsewhere in ({"topology": AUTO}, {"topology": "qq-kk"}, {"rank": "full"}, {"kernel": "lifted", "lift": 9}):
        assert Recipe("ngc", **elsewhere).chain.find(PropagateErrors) is None
    assert Recipe("ngc", rank=3).chain.find(PruneNeurons) is None
    assert Recipe("svd_llm", keep_neurons=0.5).chain.passes[0] == prune_neurons(0.5)
    assert Recipe("ngc", keep=0.5).chain.find(PruneNeurons).flexible
    assert not Recipe("ngc", keep=0.5, keep_neurons=0.6).chain.find(PruneNeurons).flexible


def test_a_changed_recipe_is_the_recipe_that_was_asked_for():
    assert Recipe("ngc", keep=0.5, gauge=False).replace(rounds=0) == Recipe("ngc", keep=0.5, gauge=False, rounds=0)
    assert Recipe("ngc", rounds=0).replace(rounds=None, keep=0.4) == Recipe("ngc", keep=0.4)


@dataclasses.dataclass(frozen=True)
class Unregistered(Pass):
    name: ClassVar[str] = "unregistered"


def test_a_method_keeps_its_passes_and_their_order(monkeypatch):
    """Also passes that occur twice, in another order than options add them, or have no options."""
    own = chain(factorise("ngc"), remeasure(1), propagate_errors(0.2), Unregistered(), remeasure(2))
    monkeypatch.setitem(METHODS, "own", lambda keep: own)
    assert Recipe("own").chain.passes == own.passes
    changed = Recipe("own", gauge=True, sensitivities=False, keep_neurons=0.5).chain.passes
    expected = chain(
        prune_neurons(0.5),
        factorise("ngc", gauge=True),
        remeasure(1, sensitivities=False),
        propagate_errors(0.2),
        Unregistered(),
        remeasure(2, sensitivities=False),
    )
    assert changed == expected.passes
    monkeypatch.setitem(METHODS, "two", lambda keep: chain(prune_neurons(0.9), factorise("ngc"), Unregistered()))
    added = Recipe("two", rounds=1).chain.passes
    assert added == (prune_neurons(0.9), factorise("ngc"), remeasure(1), Unregistered())
