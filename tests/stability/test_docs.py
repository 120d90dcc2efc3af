"""The examples of docs/stability.md and of the tutorial on models run; their assertions hold."""

import pytest

from ngc_jax.models import load
from tests.models.compact import dense_model
from tests.pages import run_examples

TUTORIAL = "tutorials/your_models_stability.md"


@pytest.mark.slow
def test_the_examples_run():
    run_examples("stability.md", least=10)


@pytest.mark.slow
def test_the_tutorial_runs_with_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_model", lambda name: dense_model())
    session = run_examples(TUTORIAL, least=6)
    assert session["model"].name == "tiny"
    assert (tmp_path / "your-models-stability.png").stat().st_size > 10_000


@pytest.mark.real_model
@pytest.mark.slow
def test_the_tutorial_runs_with_a_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = run_examples(TUTORIAL, least=6)
    metrics = {name: float(one.metric[0, 1:].mean()) for name, one in session["found"].items()}
    # As the page's picture shows: on text perturbations fade, on one word over and over hardly.
    assert metrics["a story"] < -0.04 < metrics["one word"]
    assert session["shares"]["a story"].mean() > 0.3 > 0.1 > session["shares"]["one word"].mean()
