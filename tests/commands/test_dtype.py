"""--dtype and --param-dtype: the type of the computation, and that of the stored parameters."""

import json

import numpy as np
import pytest

from ngc_jax import cli
from ngc_jax.models import load
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.fixture
def loaded(monkeypatch):
    """The models that commands have loaded."""
    found, really_load = [], load.load_from_source

    def remember(*args, **options):
        found.append(really_load(*args, **options))
        return found[-1]

    monkeypatch.setattr(load, "load_from_source", remember)
    return found


def test_commands_compute_in_one_type_and_store_in_another(loaded, tmp_path, capsys):
    model = str(save_model(tiny_model(), tmp_path / "model"))
    (tmp_path / "text.txt").write_text("What fires together wires together. " * 8)
    evaluate = ["evaluate", model, "--text", str(tmp_path / "text.txt"), "--window", "32", "--json"]
    perplexities = []
    for options in ([], ["--dtype", "bfloat16", "--param-dtype", "float32"], ["--param-dtype", "bfloat16"]):
        assert cli.main([*evaluate, str(tmp_path / "out.json"), *options]) == 0
        perplexities.append(json.loads((tmp_path / "out.json").read_text())["perplexity"])
    assert [(one.param_dtype, one.dtype) for one in loaded] == [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
    ]
    assert len(set(perplexities)) == 3
    np.testing.assert_allclose(perplexities, perplexities[0], rtol=0.05)
    generate = ["generate", model, "--prompt", "fire", "--max-new-tokens", "2"]
    assert cli.main([*generate, "--dtype", "bfloat16", "--param-dtype", "float32"]) == 0
    assert (loaded[-1].param_dtype, loaded[-1].dtype) == ("float32", "bfloat16")
    assert cli.main([*generate, "--param-dtype", "int8"]) == 2
    assert "Given value: int8" in capsys.readouterr().err
