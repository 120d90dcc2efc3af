"""The experiment on image classifiers at a small setting: its table, its files, and that training learns."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from experiments.vision.__main__ import chart, main
from experiments.vision.digits import load_digits, shifted
from ngc_jax.models.load import load_model


def test_digits_are_split_once():
    train, test = load_digits()
    assert (len(train.labels), len(test.labels)) == (1000, 797)
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert (train.pixels.min(), train.pixels.max()) == (-1, 1)
    both = np.concatenate([train.pixels, test.pixels]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) > 1790
    again, _ = load_digits()
    np.testing.assert_array_equal(again.pixels, train.pixels)


def test_shifts_move_images_by_up_to_one_pixel():
    import jax

    image = np.full((40, 1, 8, 8), -1, np.float32)
    image[:, 0, 3, 4] = 1
    moved = np.asarray(shifted(image, jax.random.key(0)))
    places = np.argwhere(moved[:, 0] == 1)
    assert len(places) == 40
    moves = places[:, 1:] - [3, 4]
    assert np.abs(moves).max() == 1
    assert len(np.unique(moves, axis=0)) == 9


@pytest.mark.slow
def test_a_small_run(tmp_path):
    options = ["--epochs", "4", "--test-images", "100", "--keep", "0.6", "0.1", "--methods", "svd", "nystrom, dense"]
    results = main(["--out", str(tmp_path), *options])
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    first, _, _, refused = results["rows"]
    assert first["stored"] <= 0.6
    assert first["interval"][0] < first["accuracy"] < first["interval"][1]
    assert "too low for form dense" in refused["refused"]
    assert results["dense"]["accuracy"] > 0.15
    assert len(chart(results["rows"], results["dense"]).series) == 2
    assert load_model(str(tmp_path / "model")).config.num_layers == 6
