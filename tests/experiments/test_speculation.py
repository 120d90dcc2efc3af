"""The experiment on speculative decoding, on tiny models."""

import json

from experiments.speculation import main
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


def test_a_model_that_drafts_for_itself(tmp_path, capsys):
    save_model(tiny_model("llama_untied"), tmp_path / "model")
    name = str(tmp_path / "model")
    options = ["--draft-tokens", "3", "--prompts", "2", "--prompt", "8", "--new", "9", "--temperature", "0"]
    main([name, "--draft", name, *options, "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["tokens_per_round"] == 4.0
    assert row["same"] == row["prompts"] == 2
    assert row["speed"] > 0
    assert "| model | 3 | 0 | 4.00 |" in capsys.readouterr().out
