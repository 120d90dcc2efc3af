"""The example of docs/export.md runs."""

from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.exporting.test_export import model_of
from tests.pages import run_examples


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(model_of("llama"), tmp_path / "smollm2-0.8")
    run_examples("export.md", least=1)
    assert load_model("smollm2-0.8-hf").plan is None
    assert load_model("smollm2-0.8.gguf").plan is None
