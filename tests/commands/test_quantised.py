"""`convert --bits` and `--store-dtype`, end to end on a tiny model."""

import json

import jax
import numpy as np
import pytest

from ngc_jax import cli
from ngc_jax.models.load import load_model
from ngc_jax.models.save import in_dtype, save_model, tensor_bytes
from tests.tiny import forward, random_tokens, tiny_model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("Groups of neurons exchange signals; a weight is what two states make of each other.\n" * 8)
    return str(file)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A dense model stored in bfloat16."""
    model = in_dtype(tiny_model(), "bfloat16")
    return str(save_model(model, tmp_path_factory.mktemp("models") / "half"))


def logits(model, tokens):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def test_a_dense_model_is_quantised_and_runs(half, text, tmp_path, capsys):
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    arguments = ["--method", "dense", "--bits", "8", "--group-size", "32", "--symmetric", "false"]
    shorter = ["--calibration-tokens", "96", "--window", "32", "--text", text]
    assert cli.main(["convert", half, *arguments, *shorter, "--out", str(out), "--json", str(summary)]) == 0
    found, model = json.loads(summary.read_text()), load_model(str(out))
    assert (found["bits"], found["group_size"], found["symmetric"], found["keep"]) == (8, 32, False, None)
    assert found["passes"] == ["quantise"]
    assert found["keep_ratio"] == 1.0
    assert found["bytes"] == sum(leaf.nbytes for leaf in in_dtype(model, "bfloat16").leaves())
    assert f"{found['bytes'] / 1e6:,.1f} MB" in (out / "README.md").read_text()
    tokens = random_tokens(20)
    dense = logits(load_model(half), tokens)
    assert 0 < np.abs(logits(model, tokens) - dense).mean() < 0.05 * np.abs(dense).mean()
    capsys.readouterr()
    assert cli.main(["info", str(out)]) == 0
    assert "bits for each parameter" in capsys.readouterr().out
    assert cli.main(["export", str(out), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), "--type", "f32"]) == 0
    np.testing.assert_allclose(
        logits(load_model(str(tmp_path / "m.gguf")), tokens), logits(model, tokens), atol=5e-3 * np.abs(dense).max()
    )


@pytest.mark.parametrize(("options", "expected"), [([], "bfloat16"), (["--store-dtype", "float32"], "float32")])
def test_a_model_of_16_bits_is_stored_in_16_bits(half, tmp_path, options, expected):
    assert cli.main(["convert", half, "--method", "svd", *options, "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == expected
    model = load_model(str(tmp_path / "out"))
    numbers = model.count_parameters() * (2 if expected == "bfloat16" else 4)
    assert numbers < tensor_bytes(tmp_path / "out") < numbers + 50_000


def test_a_model_of_32_bits_is_stored_in_32_bits(tmp_path):
    dense = str(save_model(tiny_model(), tmp_path / "dense"))
    assert cli.main(["convert", dense, "--method", "svd", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_numbers_too_large_for_float16_are_refused(tmp_path, capsys):
    model = tiny_model()
    large = jax.tree.map(lambda leaf: leaf.at[0].set(1e6) if leaf.ndim == 1 else leaf, model.params)
    with pytest.raises(Exception, match="too large for float16"):
        in_dtype(model.__class__(**{**vars(model), "params": large}), "float16")
