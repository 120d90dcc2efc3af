"""Without lm-eval; what needs it is in tests/parity."""

import subprocess
import sys

import pytest

# Runs a module as the interpreter's -m does, where lm-eval cannot be imported.
PROGRAM = """
import runpy, sys
sys.modules["lm_eval"] = None
{}
"""


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("runpy.run_module('ngc_jax.evaluation.harness', run_name='__main__')", 2),
        ("import ngc_jax.evaluation.harness", 1),
    ],
)
def test_a_missing_package_is_named_and_how_to_install_it(program, code):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(program)], capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert "needs lm_eval, which is not installed; pip install 'ngc-jax[eval]'" in run.stderr.splitlines()[-1]
    assert ("Traceback" in run.stderr) == (code == 1)
