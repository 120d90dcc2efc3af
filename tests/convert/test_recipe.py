import dataclasses

import pytest

from ngc_jax.convert.methods import METHODS
from ngc_jax.convert.recipe import AUTO, Recipe
from ngc_jax.errors import UsageError


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


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_is_the_method_s_own(method):
    recipe, definition = Recipe(method), METHODS[method]
    assert recipe.definition is definition
    assert recipe.resolved_topology == definition.topology
    assert recipe.resolved_allocation == definition.allocation
    assert recipe.resolved_gauge == definition.gauge
    # A method is not asked for what it does not measure.
    assert definition.allocation != "loss" or definition.needs != "nothing"


def test_what_is_given_goes_before_the_method_s_own():
    recipe = Recipe("svd_llm", "qkv-o", allocation="loss", gauge=True, rank_multiple=4)
    assert recipe.resolved_topology == "qkv-o"
    assert recipe.resolved_allocation == "loss"
    assert recipe.resolved_gauge
    assert not Recipe("ngc", gauge=False).resolved_gauge
    assert Recipe("ngc").resolved_sensitivities
    assert not Recipe("ngc", sensitivities=False).resolved_sensitivities
    assert not Recipe("ngc", rounds=0).resolved_sensitivities
    assert Recipe("ngc", rank=5).resolved_allocation == "uniform"
    assert Recipe("ngc", rank=5, allocation="uniform").resolved_allocation == "uniform"
    assert Recipe("ngc", AUTO).resolved_topology == AUTO
    assert Recipe("ngc").resolved_propagation == METHODS["ngc"].propagation > 0
    assert Recipe("ngc", "qkv-o").resolved_propagation > 0
    assert Recipe("svd_llm").resolved_propagation == 0
    for elsewhere in ({"topology": AUTO}, {"topology": "qq-kk"}, {"rank": "full"}, {"kernel": "lifted", "lift": 9}):
        assert Recipe("ngc", **elsewhere).resolved_propagation == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.keep = 0.5
