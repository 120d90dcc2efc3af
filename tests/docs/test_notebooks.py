"""The notebooks run from top to bottom, on a tiny model in place of the real one."""

import json

import pytest

from tests.pages import DOCS
from tests.tiny import tiny_model

NOTEBOOKS = sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb"))


def code_of(name):
    cells = json.loads((DOCS / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ngc_jax.models.load.load_model", lambda _: tiny_model())
    monkeypatch.setattr("ngc_jax.text.read_text", lambda _: "Groups of neurons exchange signals of few numbers. " * 40)
    session: dict = {}
    for number, code in enumerate(code_of(name)):
        exec(compile(code, f"{name}, cell {number}", "exec"), session)
    assert capsys.readouterr().out
    if "losses" in session:
        assert session["losses"][-1] < session["losses"][0]
    else:
        assert (tmp_path / "smollm2-0.8" / "config.json").is_file()


def test_notebooks_are_kept_without_outputs():
    assert len(NOTEBOOKS) == 2
    for name in NOTEBOOKS:
        cells = json.loads((DOCS / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
