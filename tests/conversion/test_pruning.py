import dataclasses
import weakref

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngc_jax.conversion import Calibration, Recipe
from ngc_jax.conversion.output_gradients import GradientMeasurement, measure_output_gradients
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.pruning import PRUNED_ROLES, nystrom_reconstruct, prune_layers, select_neurons
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.conversion.helpers import measured, pruning_of
from tests.tiny import HF_CONFIGS, forward, random_tokens, tiny_model

TOKENS = random_tokens(1200)


def logits(model, tokens):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def covariance(generator, size, samples=400):
    x = generator.standard_normal((samples, size)) @ generator.standard_normal((size, size))
    return x, x.T @ x / samples


def loss_without(weight, metric, moment, kept):
    """tr(G D C D^T) of the best weight on the inputs that stay, by least squares in float64."""
    root = np.linalg.cholesky(moment).T  # moment = root^T root
    best = np.linalg.lstsq(root[:, kept], root @ weight.T, rcond=None)[0]
    change = root @ weight.T - root[:, kept] @ best
    return np.einsum("tm,mn,tn->", change, metric, change)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.data())
def test_each_neuron_that_goes_costs_least(seed, size, data):
    """The greedy choice, one at a time, against trying every neuron with a least squares problem of its own."""
    count = data.draw(st.integers(1, size))
    generator = np.random.default_rng(seed)
    _, moment = covariance(generator, size)
    weight = generator.standard_normal((5, size))
    _, metric = covariance(generator, 5)
    kept = list(range(size))
    while len(kept) > count:
        kept = min(
            ([k for k in kept if k != gone] for gone in kept),
            key=lambda left: loss_without(weight, metric, moment, left),
        )
    found = select_neurons(np.linalg.cholesky(metric).T @ weight, moment, count)
    np.testing.assert_array_equal(found, kept)


def test_removals_in_blocks_are_those_one_by_one(monkeypatch):
    generator = np.random.default_rng(0)
    _, moment = covariance(generator, 90)
    weight = generator.standard_normal((20, 90))
    in_blocks = select_neurons(weight.copy(), moment, 11)
    assert len(in_blocks) == 11
    monkeypatch.setattr("ngc_jax.conversion.pruning._BLOCK", 1)
    np.testing.assert_array_equal(in_blocks, select_neurons(weight.copy(), moment, 11))


def test_the_weight_on_those_that_stay_is_the_least_squares_solution():
    generator = np.random.default_rng(1)
    x, moment = covariance(generator, 9)
    weight, kept = generator.standard_normal((4, 9)), np.array([0, 2, 3, 7])
    best = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(nystrom_reconstruct(weight, moment, kept), best, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(nystrom_reconstruct(weight, moment, np.arange(9)), weight)
    # Shrunk: ridge regression, each input's penalty in proportion to its energy.
    penalty = np.diag(np.diag(moment)[kept])
    expected = (
        weight[:, kept]
        + np.linalg.solve(
            0.7 * moment[np.ix_(kept, kept)] + 0.3 * penalty,
            0.7 * np.delete(moment, kept, 0)[:, kept].T @ np.delete(weight, kept, 1).T,
        ).T
    )
    np.testing.assert_allclose(nystrom_reconstruct(weight, moment, kept, shrinkage=0.3), expected, rtol=1e-3, atol=1e-4)


def test_silent_neurons_go_first():
    """Neurons that never fire, and neurons that nobody reads; the second moment is singular."""
    generator = np.random.default_rng(2)
    x = generator.standard_normal((50, 8))
    x[:, [1, 4]] = 0.0
    weight = generator.standard_normal((3, 8))
    weight[:, 6] = 0.0
    kept = select_neurons(weight.copy(), x.T @ x / 50, 5)
    np.testing.assert_array_equal(kept, [0, 2, 3, 5, 7])
    # Fewer tokens than neurons, and none of either kind at all.
    assert len(select_neurons(weight.copy(), x[:3].T @ x[:3] / 3, 4)) == 4
    assert len(select_neurons(np.zeros((3, 8)), np.zeros((8, 8)), 2)) == 2
    # Not even a second moment, by rounding.
    moment = np.diag([1.0, 0.5, -1e-3])
    np.testing.assert_array_equal(select_neurons(np.ones((1, 3)), moment, 2), [0, 1])
    assert np.isfinite(nystrom_reconstruct(np.ones((1, 3)), moment, np.array([0, 2]))).all()


def test_moments_that_rounding_made_indefinite():
    """What the others tell, by negative eigenvalues raised to the ridge; the moment that was given is as it was."""
    generator = np.random.default_rng(5)
    _, moment = covariance(generator, 8, samples=5)
    moment -= 0.05 * np.diag(moment).mean() * np.eye(8)
    weight, kept, gone = generator.standard_normal((3, 8)), np.array([0, 1, 2, 4, 5, 7]), np.array([3, 6])
    given = moment.copy()
    ridge = 1e-6 * np.diag(moment[np.ix_(kept, kept)]).mean()
    values, vectors = np.linalg.eigh(moment[np.ix_(kept, kept)] + ridge * np.eye(6))
    assert values.min() < 0
    inverse = vectors / np.maximum(values, ridge) @ vectors.T
    expected = weight[:, kept] + weight[:, gone] @ moment[np.ix_(gone, kept)] @ inverse
    np.testing.assert_allclose(nystrom_reconstruct(weight, moment, kept), expected, rtol=1e-6)
    assert len(select_neurons(weight.copy(), moment, 6)) == 6
    np.testing.assert_array_equal(moment, given)


@pytest.mark.parametrize(
    "architecture",
    [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in HF_CONFIGS],
)
def test_neurons_that_others_double_are_no_loss(architecture):
    """Every hidden neuron twice: half of them compute the same, for any biases and gates of the architecture."""
    model = tiny_model(architecture)
    half = model.config.mlp_dim // 2
    layers = {}
    for number, layer in model.params["layers"].items():
        mlp = {role: dict(layer["mlp"][role]) for role in model.config.mlp_roles}
        for role in model.config.mlp_roles[:-1]:
            mlp[role] = {name: leaf.at[half:].set(leaf[:half]) for name, leaf in mlp[role].items()}
        layers[number] = {**layer, "mlp": mlp}
    model = dataclasses.replace(model, params={**model.params, "layers": layers})
    config = dataclasses.replace(model.config, mlp_dim=half)
    narrow = prune_layers(model, config, measured(model, Recipe("ngc", keep=0.5, keep_neurons=0.5), TOKENS, window=60))
    statistics = list(narrow.statistics)
    assert all(len(kept) == half == len(set(kept % half)) for kept in narrow.kept.values())
    tokens = random_tokens(40, seed=9)
    dense = logits(model, tokens)
    assert np.abs(logits(narrow.model, tokens) - dense).max() < 2e-3 * np.abs(dense).max()
    # The pruned model computes the same function, so that its statistics can be measured on it.
    own = list(measured(narrow.model, Recipe("ngc", keep=0.5, keep_neurons=1.0), TOKENS, window=60))
    for layer, expected in zip(statistics, own, strict=True):
        assert layer.keys() == expected.keys()
        for name, entry in layer.items():
            for ours, theirs in (
                (entry.second_moment, expected[name].second_moment),
                (entry.absolute_mean, expected[name].absolute_mean),
                *(
                    [(entry.gradients.mean_square, expected[name].gradients.mean_square)]
                    if name[-1] not in PRUNED_ROLES  # the gradient of a doubled neuron was half
                    else []
                ),
            ):
                np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.005 * np.abs(theirs).max())
            assert entry.gradients.second_moment.shape == expected[name].gradients.second_moment.shape


def test_only_the_narrow_statistics_of_a_layer_live_while_they_are_used():
    """In a large model those of the d block alone are as large as a layer's weights."""
    model = tiny_model()
    recipe = Recipe("svd_llm", keep=0.5, keep_neurons=0.5)
    config, _ = recipe.chain.plan(model.config, recipe.keep)
    seen, used = [], []

    def watched(statistics):
        seen.extend(weakref.ref(entry.second_moment) for name, entry in statistics.items() if name[-1] == "d")
        return statistics

    for statistics in prune_layers(model, config, map(watched, measured(model, recipe, TOKENS, window=60))).statistics:
        assert not any(moment() is not None for moment in used)
        used = [weakref.ref(entry.second_moment) for entry in statistics.values()]
        assert not any(moment() is not None for moment in seen)
        del statistics
    assert len(seen) == model.config.num_layers


@pytest.mark.parametrize("geometry", ["full", "diagonal"])
def test_gradients_of_outputs_that_stay(geometry):
    """G of some outputs is a part of G, and W^T G W is made of that part; against the gradients themselves."""
    model = tiny_model()
    config = dataclasses.replace(model.config, mlp_dim=16)
    recipe = Recipe("ngc", keep=0.5, keep_neurons=0.5, gradients=geometry)
    narrow = prune_layers(model, config, measured(model, recipe, TOKENS, window=60))
    for layer, statistics in enumerate(narrow.statistics):
        kept = narrow.kept[layer]
        gradients, _ = measure_output_gradients(
            model, Calibration(TOKENS, window=60), GradientMeasurement(full_roles="ug")
        )
        for role in "ug":
            whole, found = gradients[f"layers.{layer}.mlp.{role}"], statistics[f"layers.{layer}.mlp.{role}"].gradients
            np.testing.assert_allclose(found.mean_square, whole.mean_square[kept], rtol=1e-4)
            if geometry == "diagonal":
                assert found.second_moment is None
                continue
            expected = whole.second_moment[np.ix_(kept, kept)]
            if found.second_moment.shape != expected.shape:
                kernel = np.asarray(model.params["layers"][str(layer)]["mlp"][role]["kernel"], np.float64)[kept]
                expected = kernel.T @ expected @ kernel
            np.testing.assert_allclose(found.second_moment, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "levers"),
    [
        ("ngc", {}),
        ("ngc", {"rounds": 0, "propagation": 0.0}),
        pytest.param("ngc", {"topology": "qkv-o-ug-dd", "rounds": 1}, marks=pytest.mark.slow),
        pytest.param("ngc", {"gradients": "diagonal"}, marks=pytest.mark.slow),
        ("svd_llm", {"keep_neurons": 0.5}),
        ("nystrom", {}),
        pytest.param("svd_llm", {"keep_neurons": 0.5, "propagation": 0.3}, marks=pytest.mark.slow),
        ("fwsvd", {"keep_neurons": 0.75}),
        ("basis_sharing", {"keep_neurons": 0.75}),
    ],
)
def test_what_went_counts_as_not_stored(tmp_path, method, levers):
    model = tiny_model("llama_untied")
    recipe = Recipe(method, keep=0.5, **levers)
    planned = pruning_of(model.config, recipe)
    narrow = planned.config
    assert narrow.mlp_dim < model.config.mlp_dim
    result = convert(model, recipe, TOKENS, window=60, batch_size=2, gradient_tokens=600)
    assert result.config == narrow
    assert result.plan.removed == planned.removed > 0
    assert result.plan.dense_parameters() == sum(block.parameters for block in model.config.blocks())
    assert 0.4 < result.plan.keep_ratio() <= 0.5
    save_model(result, tmp_path / "saved")
    back = load_model(str(tmp_path / "saved"))
    assert back.config == narrow
    assert back.plan == result.plan
    np.testing.assert_array_equal(logits(back, TOKENS[:20]), logits(result, TOKENS[:20]))
    with open_source(str(tmp_path / "saved")) as source:
        summary = inspect_model(source).summary()
    assert summary["keep_ratio"] == result.plan.keep_ratio()
    assert summary["dense_parameters"] == result.plan.dense_parameters()


def test_nystrom_keeps_mlps_dense():
    model = tiny_model("llama_untied")
    result = convert(model, Recipe("nystrom", keep=0.6), TOKENS, window=60, batch_size=2)
    assert {block.name.split(".")[-1] for block in result.plan.dense} == set("ugd")
    assert {group.name.split("-")[-1] for group in result.plan.groups} == set("qkvo")
    shares = [group.count_parameters() / group.dense_parameters for group in result.plan.groups]
    mlp = sum(block.parameters for block in result.plan.dense)
    attention = sum(group.dense_parameters for group in result.plan.groups)
    left = (0.6 * result.plan.dense_parameters() - mlp) / attention
    assert all(left - 0.15 < share <= left for share in shares)  # a rank is 0.1 of the smallest matrices
    kernel = result.params["layers"]["1"]["mlp"]["d"]["kernel"]
    assert kernel.shape == (model.config.embed_dim, result.config.mlp_dim)


def test_errors_of_narrowing_are_propagated():
    """Fitting on the inputs from converted layers brings the pruned model nearer to the original."""
    model = tiny_model("llama_untied")
    tokens = random_tokens(240, seed=8)
    dense = jax.nn.softmax(logits(model, tokens))
    errors = []
    for propagation in (0.0, 0.5):
        recipe = Recipe("svd_llm", keep=0.6, keep_neurons=0.75, gauge=True, propagation=propagation)
        ours = jax.nn.softmax(logits(convert(model, recipe, TOKENS, window=60, batch_size=4), tokens))
        errors.append(float(np.square(ours - dense).sum()))
    assert errors[1] < errors[0]


def test_nothing_goes_where_all_is_kept_or_there_is_no_mlp_to_narrow():
    config = tiny_model().config
    for recipe in (
        Recipe("ngc", keep=1.0),
        Recipe("ngc", rank="full"),
        Recipe("ngc", rank=3),
        Recipe("ngc", keep=0.5, topology="q-k-v"),
        Recipe("ngc", keep=0.5, keep_neurons=1.0),
        Recipe("svd_llm", keep=0.5),
        Recipe("ngc", keep=0.5, kernel="riemannian"),
    ):
        planned = pruning_of(config, recipe)
        assert planned is None or (planned.config, planned.keep) == (config, recipe.keep)


@pytest.mark.parametrize(
    ("levers", "words"),
    [
        ({"keep_neurons": 0.0}, "outside"),
        ({"keep_neurons": 1.5}, "outside"),
        ({"method": "svd", "keep_neurons": 0.5}, "measures no inputs"),
        ({"rank": 3, "keep_neurons": 0.5}, "leave out rank or keep-neurons"),
        ({"topology": "q-k-v", "keep_neurons": 0.5}, "add them to it"),
        ({"keep": 0.9, "keep_neurons": 0.2}, "keep more hidden neurons"),
    ],
)
def test_widths_that_make_no_sense_are_refused(levers, words):
    with pytest.raises(UsageError, match=words):
        pruning_of(tiny_model().config, Recipe(**{"method": "ngc", "keep": 0.5, **levers}))


def test_widths_are_tiles():
    model = tiny_model()
    for dense, keep, width in ((1536, 0.6, None), (11008, 0.5, None), (300, 0.5, None), (1536, 0.9, 0.93)):
        config = dataclasses.replace(model.config, mlp_dim=dense)
        narrow = pruning_of(config, Recipe("ngc", keep=keep, keep_neurons=width)).config
        assert narrow.mlp_dim % (128 if dense % 128 == 0 else 4) == 0
        assert 0 < narrow.mlp_dim < dense


def test_statistics_that_are_not_finite_are_refused():
    model = tiny_model()
    config = dataclasses.replace(model.config, mlp_dim=16)
    stream = list(measured(model, Recipe("svd_llm", keep=0.5, keep_neurons=0.5), TOKENS, window=60))
    stream[1]["layers.1.mlp.d"].second_moment[0, 0] = np.nan
    narrow = prune_layers(model, config, stream)
    next(narrow.statistics)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.d are not finite"):
        next(narrow.statistics)


@pytest.mark.parametrize(
    ("method", "widths"),
    [
        ("nystrom", {0.95: 1536, 0.9: 1408, 0.8: 1280, 0.7: 1024, 0.6: 896, 0.5: 768, 0.4: 640}),
        ("ngc", {0.95: 1536, 0.9: 1536, 0.8: 1408, 0.7: 1280, 0.6: 1024, 0.5: 896, 0.4: 768}),
    ],
)
def test_widths_of_smollm2(method, widths):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = DecoderConfig.from_hf({**HF_CONFIGS["llama"], **sizes, "num_hidden_layers": 2, "head_dim": 64})
    for keep, width in widths.items():
        assert Recipe(method, keep=keep).chain.plan(config, keep)[0].mlp_dim == width
    for keep, width in {0.34: 512, 0.77: 1152, 0.8: 1152}.items():
        recipe = Recipe("nystrom", topology="u-g-d", keep=keep)
        assert recipe.chain.plan(config, keep)[0].mlp_dim == width
