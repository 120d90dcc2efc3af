"""`ngc-jax stability` on a tiny model."""

import json

import numpy as np
import pytest

from ngc_jax.cli import main
from ngc_jax.models.save import save_model
from tests.models.compact import compact_model

LINES = ["one two three four five", "the same again: a longer line of text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stability") / "model"
    save_model(compact_model(), directory)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(LINES) + "\n")
    return file


def measure(model, prompts, out, *options):
    assert main(["stability", str(model), "--prompts", str(prompts), "--out", str(out), *options]) == 0
    assert (out / "stability.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "stability.json").read_text())


def test_depth_has_a_number_for_every_token_layer_and_group(model, prompts, tmp_path):
    found = measure(model, prompts, tmp_path / "out", "--exponents", "4")
    assert [prompt["text"] for prompt in found["prompts"]] == LINES
    for prompt in found["prompts"]:
        count = len(prompt["tokens"])
        assert "".join(prompt["tokens"]) == prompt["text"]
        assert np.shape(prompt["exponents"]) == (count, 4)
        assert np.shape(prompt["growth"]) == (count, 3)
        assert set(prompt["groups"]) == {"0-qkk", "0-vv", "0-ug", "1-qd"}
        np.testing.assert_allclose(prompt["metric"], np.mean(prompt["tokens_metric"][1:]), atol=1e-6)
        np.testing.assert_allclose(np.array(prompt["growth"])[:, -1] / 2, prompt["tokens_metric"], atol=1e-6)
        assert prompt["tokens_potential_share"][0] < 1e-5 < prompt["potential_share"] < 1


def test_the_sequence_has_a_number_for_every_segment(model, prompts, tmp_path):
    found = measure(model, prompts, tmp_path / "out", "--along", "sequence", "--memory", "8", "--exponents", "2")
    for prompt in found["prompts"]:
        segments = len(prompt["tokens"]) // 8 - 1
        assert np.shape(prompt["growth"]) == (segments, 8)
        np.testing.assert_allclose(prompt["metric"], np.mean(prompt["segments"]), atol=1e-6)
        assert prompt["ends"] == [8 * (index + 2) - 1 for index in range(segments)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--prompts FILE"),
        (["--prompt", " "], "empty"),
        (["--prompt", "a"], "expected 2 or more"),
        (["--prompt", "some words", "--along", "sequence", "--memory", "32"], "expected 64 or more"),
        (["--prompt", "some words", "--exponents", "0"], "exponents"),
        (["--prompt", "some words", "--exponents", "99"], "expected 1 to 24"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, tmp_path, capsys, options, told):
    assert main(["stability", str(model), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
