import numpy as np
import pytest

from ngc_jax.conversion.statistics import OutputGradients, Statistics
from ngc_jax.conversion.statistics_file import load_statistics, save_statistics


def layer(seed):
    generator = np.random.default_rng(seed)
    shared, absolute = generator.standard_normal((5, 5)), generator.standard_normal(5)
    gradients = OutputGradients(7, generator.standard_normal(3), generator.standard_normal((3, 3)))
    return {
        "q": Statistics(11, shared, absolute, None, gradients, site="input"),
        "k": Statistics(
            11, shared, absolute, generator.standard_normal(5), OutputGradients(7, np.ones(4)), site="input"
        ),
    }


def test_what_is_loaded_is_what_was_saved(tmp_path):
    layers = [layer(0), layer(1)]
    save_statistics(layers, tmp_path / "s", {"needs": ["inputs"]})
    loaded, about = load_statistics(tmp_path / "s")
    assert about["needs"] == ["inputs"]
    for before, after in zip(layers, loaded, strict=True):
        assert after["q"].second_moment is after["k"].second_moment
        assert after["q"].site == after["k"].site == "input"
        for name in before:
            np.testing.assert_array_equal(after[name].second_moment, before[name].second_moment)
            np.testing.assert_array_equal(after[name].gradients.mean_square, before[name].gradients.mean_square)
        assert after["q"].fisher is None
        assert after["k"].gradients.second_moment is None
        assert after["q"].gradients.count == 7
        np.testing.assert_array_equal(after["q"].gradients.second_moment, before["q"].gradients.second_moment)


def test_nothing_is_nothing_and_a_failure_leaves_nothing(tmp_path):
    assert load_statistics(tmp_path / "s") is None
    with pytest.raises(TypeError):
        save_statistics([layer(0)], tmp_path / "s", {"needs": {"not", "json"}})
    assert not list(tmp_path.iterdir())
