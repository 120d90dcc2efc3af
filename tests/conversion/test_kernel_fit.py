import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.closed_form import DAMPING, best_states
from ngc_jax.conversion.kernel_fit import fit_kernel, local_loss, loss_roots
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.groups.kernels import Kernel, from_bilinear, weights
from ngc_jax.groups.plan import GroupPlan
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.planning.allocate import DENSE
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import choose_ranks, given_ranks
from tests.conversion.helpers import factorise_of, rule_of
from tests.tiny import forward, random_tokens, tiny_model

NAMES = ("layers.0.attn.q", "layers.0.attn.k")
SIZES = {"layers.0.attn.q": 14, "layers.0.attn.k": 9}
INPUTS, RANK = 11, 4
LIFTED = Kernel("lifted", lift=10)


def covariance(size, generator):
    square = generator.standard_normal((size, size + 3))
    return square @ square.T / size


def group(seed=0):
    """Dense weights of two members that read one input, and what calibration would have measured."""
    generator = np.random.default_rng(seed)
    moment = covariance(INPUTS, generator)
    dense, statistics = [], []
    for outputs in SIZES.values():
        dense.append(generator.standard_normal((outputs, INPUTS)))
        g = covariance(outputs, generator)
        gradients = OutputGradients(50, np.diag(g).copy(), g)
        statistics.append(Statistics(50, moment, np.sqrt(np.diag(moment)), gradients=gradients, site="input"))
    return dense, statistics


def bilinear_params(states):
    outputs = {name: jnp.asarray(q) for name, q in zip(NAMES, states.output_states, strict=True)}
    return {"input_states": jnp.asarray(states.input_states), "output_states": outputs}


def test_the_loss_is_the_trace_formula_in_float64():
    dense, statistics = group()
    kernel = LIFTED
    start = from_bilinear(kernel, bilinear_params(best_states(dense, statistics[0].second_moment).truncated(RANK)))
    roots = [loss_roots(weight, entry) for weight, entry in zip(dense, statistics, strict=True)]
    found = local_loss(kernel, NAMES, start, [jnp.asarray(w, jnp.float32) for w in dense], roots, weight_share=0.3)
    sums = np.zeros(4)
    for name, weight, entry in zip(NAMES, dense, statistics, strict=True):
        error = weight - np.asarray(weights(kernel, start, name), np.float64)
        g = entry.gradients.second_moment
        g = g + DAMPING * np.diag(g).mean() * np.eye(len(g))
        c = entry.second_moment
        sums += [np.trace(g @ m @ c @ m.T) for m in (error, weight)] + [np.square(m).sum() for m in (error, weight)]
    np.testing.assert_allclose(found, sums[0] / sums[1] + 0.3 * sums[2] / sums[3], rtol=1e-4)


def test_a_block_whose_gradients_were_pulled_to_its_inputs_uses_their_diagonal():
    dense, statistics = group()
    gradients = statistics[0].gradients
    pulled = dataclasses.replace(gradients, second_moment=dense[0].T @ gradients.second_moment @ dense[0])
    k, _ = loss_roots(dense[0], dataclasses.replace(statistics[0], gradients=pulled))
    mean_square = gradients.mean_square
    np.testing.assert_allclose(np.square(k), mean_square + DAMPING * mean_square.mean(), rtol=1e-5)


@pytest.mark.parametrize("kernel", [Kernel("riemannian", metric_rank=2), Kernel("riemannian")])
def test_the_riemannian_kernel_starts_at_the_bilinear_loss_and_never_ends_above_it(kernel):
    dense, statistics = group()
    states = best_states(dense, statistics[0].second_moment, [s.gradients for s in statistics]).truncated(RANK)
    roots = [loss_roots(weight, entry) for weight, entry in zip(dense, statistics, strict=True)]
    arrays = [jnp.asarray(w, jnp.float32) for w in dense]
    bilinear = local_loss(Kernel(), NAMES, bilinear_params(states), arrays, roots)
    fitted, losses = fit_kernel(kernel, NAMES, dense, statistics, states, steps=60)
    np.testing.assert_allclose(losses[0], bilinear, rtol=1e-3)
    assert len(losses) == 61
    end = local_loss(kernel, NAMES, fitted, arrays, roots)
    np.testing.assert_allclose(end, losses.min(), rtol=1e-3)
    # It has no more weights to choose from than the bilinear group of its rank, whose best is known.
    np.testing.assert_allclose(end, bilinear, rtol=1e-2)


def test_the_lifted_kernel_finds_weights_beyond_the_rank_of_its_states():
    # A weight whose directions matter alike: what r of them leave is known, and much.
    weight = np.random.default_rng(3).standard_normal((30, 26))
    best = best_states([weight], np.eye(26)).truncated(7)
    bilinear = np.square(weight - best.weights()[0]).sum() / np.square(weight).sum()
    kernel = Kernel("lifted", lift=26)
    fitted, losses = fit_kernel(kernel, NAMES[:1], [weight], [], best, steps=1500)
    assert losses.min() < 0.8 * bilinear
    error = weight - np.asarray(weights(kernel, fitted, NAMES[0]))
    np.testing.assert_allclose(np.square(error).sum() / np.square(weight).sum(), losses.min(), rtol=1e-2)


def test_no_steps_are_the_start():
    dense, statistics = group()
    states = best_states(dense, statistics[0].second_moment).truncated(RANK)
    fitted, losses = fit_kernel(LIFTED, NAMES, dense, statistics, states, steps=0)
    assert len(losses) == 1
    assert jax.tree.map(jnp.shape, fitted)["input_states"] == (INPUTS, RANK)


@pytest.mark.parametrize("method", ["ngc", "svd_llm", "svd_llm_v2"])
def test_ranks_store_no_more_than_the_bilinear_ones(method):
    model = tiny_model("llama_untied")
    cells = candidate_cells(model.config, "qkv-o-u-g-d" if method == "ngc" else "q-k-v-o-u-g-d")
    groups = all_candidates(cells)
    energies = {g.name: np.linspace(1, 0, min(g.outputs, g.inputs)) for g in groups}

    def ranks(**options):
        recipe = Recipe(method, "qkv-o-u-g-d" if method == "ngc" else None, 0.6, gauge=False, rounds=0, **options)
        return given_ranks(rule_of(recipe), groups) or choose_ranks(rule_of(recipe), cells, energies.get)

    kernel = Kernel("lifted", lift=30)
    plain, lifted = ranks(), ranks(kernel="lifted", lift=30)
    for g in groups:
        if plain[g.name] == DENSE:
            assert lifted[g.name] == DENSE
            continue
        budget = GroupPlan(g.name, g.members, plain[g.name]).count_parameters()
        stored = GroupPlan(g.name, g.members, lifted[g.name], kernel).count_parameters()
        assert stored <= budget or lifted[g.name] == 1
        larger = lifted[g.name] + 1
        if larger < 30:
            assert GroupPlan(g.name, g.members, larger, kernel).count_parameters() > budget


@pytest.mark.parametrize(
    "options", [{"kernel": "riemannian", "metric_rank": 2}, {"kernel": "lifted", "lift": 30}], ids=lambda o: o["kernel"]
)
def test_a_converted_model_counts_saves_and_runs(options, tmp_path):
    model, tokens = tiny_model("llama_untied"), random_tokens(120)
    result = convert(model, Recipe("ngc", keep=0.6, fit_steps=5, **options), tokens, window=40, batch_size=2)
    assert {g.kernel for g in result.plan.groups} == {factorise_of(Recipe(**options)).interaction}
    assert 0.5 < result.plan.keep_ratio() <= 0.6
    save_model(result, tmp_path / "model", card="tiny\n")
    back = load_model(str(tmp_path / "model"), dtype="float32")
    assert back.plan == result.plan
    window = random_tokens(20, seed=5)[None]
    there, here = (forward(m.params, window, decoder=m.decoder)[0] for m in (back, result))
    np.testing.assert_allclose(there, here, atol=1e-5)
