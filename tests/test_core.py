"""Loading, generation and measurement need the core dependencies only."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.core_program import CORE

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_of_the_core_import_nothing_else() -> None:
    program = (
        "import sys; from tests.core_program import *; sys.meta_path.insert(0, Refusing()); print(import_all(PACKAGES))"
    )
    assert int(run("-c", program)) > 30


@pytest.mark.slow
def test_a_model_runs_without_the_other_packages() -> None:
    assert run(str(ROOT / "tests" / "core_program.py")).startswith("generated ")


def test_the_project_lists_its_core_first() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [dependency.split(">=")[0] for dependency in project["dependencies"]]
    assert tuple(names[: len(CORE)]) == CORE
