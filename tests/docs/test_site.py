"""The documentation site: its navigation is whole, and the Python of its first pages runs on a tiny model."""

from pathlib import Path

import pytest
import yaml

from ngc_jax.conversion.chains import REGISTERED
from ngc_jax.conversion.factorisations import FACTORISATIONS
from ngc_jax.conversion.methods import METHODS
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.models.compact import compact_model
from tests.pages import DOCS, run_examples
from tests.tiny import tiny_model

# Made by docs/api_pages.py when the site is built.
MADE = {"contributing.md"}


def pages_of(navigation):
    if isinstance(navigation, str):
        return [navigation]
    entries = navigation if isinstance(navigation, list) else navigation.values()
    return [page for entry in entries for page in pages_of(entry)]


def test_the_navigation_has_every_page_once():
    options = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    listed = pages_of(options["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"api/index.md"}
    assert set(listed) - MADE == written
    assert len(listed) == len(set(listed))


def test_every_package_of_the_reference_is_one():
    rows = [line for line in (DOCS / "api" / "index.md").read_text().splitlines() if line.startswith("| [`ngc_jax.")]
    linked = {line.split("](")[1].split("/")[0] for line in rows}
    hook = (DOCS / "api_pages.py").read_text()
    assert len(linked) == 9
    for name in linked:
        assert (DOCS.parent / "ngc_jax" / name / "__init__.py").is_file()
        assert f'"{name}"' in hook


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, a tiny model for the real one and a short text for Python's documentation."""
    monkeypatch.chdir(tmp_path)
    own = load_model
    monkeypatch.setattr("ngc_jax.models.load.load_model", lambda name: tiny_model() if ":" in name else own(name))
    monkeypatch.setattr("ngc_jax.text.read_text", lambda name: "Groups of neurons tell others what they see. " * 20)
    return tmp_path


def test_the_examples_of_the_first_page_run(folder):
    session = run_examples("index.md", least=2)
    assert load_model(str(folder / "smollm2-0.8")).plan == session["compact"].plan
    assert session["mine"].config.mlp_dim < session["model"].config.mlp_dim


def test_the_example_of_converting_runs(folder):
    session = run_examples("howto/convert.md", least=1)
    assert load_model(str(folder / "smollm2-0.8")).plan == session["compact"].plan


def test_the_example_of_quantising_runs(folder):
    run_examples("quantisation.md", least=1)
    assert load_model(str(folder / "smollm2-nearest")).quantised


def test_the_example_of_evaluating_runs(folder):
    save_model(compact_model(), Path("smollm2-0.8"))
    session = run_examples("howto/evaluate.md", least=1)
    assert 1 < session["measured"].perplexity < 10 * session["model"].config.vocab_size


def test_the_method_of_the_page_can_be_added(folder, monkeypatch):
    for name in ("svd_llm_diagonal", "pruned_svd_llm"):
        monkeypatch.setitem(METHODS, name, None)  # taken out again after the test
    monkeypatch.setitem(FACTORISATIONS, "svd_llm_diagonal", None)
    session = run_examples("howto/add_a_method.md", least=4)
    assert FACTORISATIONS["svd_llm_diagonal"].function is session["svd_llm_diagonal"]
    assert all(len(group.members) == 1 for group in session["compact"].plan.groups)


def test_the_pass_of_the_page_can_be_added(folder, monkeypatch):
    monkeypatch.setitem(REGISTERED, "scale_states", None)
    del REGISTERED["scale_states"]
    session = run_examples("howto/add_a_pass.md", least=2)
    group = session["half"].params["groups"]["L0-q"]
    whole = session["convert"](session["model"], "svd", keep=0.8).params["groups"]["L0-q"]
    for block, states in group["output_states"].items():
        assert (states == whole["output_states"][block] / 2).all()
