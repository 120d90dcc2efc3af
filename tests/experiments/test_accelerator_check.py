"""The accelerator check runs whole at its tiny size, without the packages that an accelerator's machine may lack."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.accelerator_check.inference import variants
from experiments.accelerator_check.linear_algebra import refine_eigenvectors, second_moment, solve_refined
from experiments.accelerator_check.records import Records, run_figures
from experiments.accelerator_check.sizes import SIZES, grouped_plan, peaks, pruned_width
from experiments.accelerator_check.training import flops_per_token
from ngc_jax.models.config import DecoderConfig

ROOT = Path(__file__).parents[2]
# Everything that the project needs elsewhere and that this program must not import.
BLOCKED = [
    "datasets",
    "docstring_parser",
    "gguf",
    "grain",
    "huggingface_hub",
    "jsonargparse",
    "matplotlib",
    "sentencepiece",
    "tensorboardX",
    "threadpoolctl",
    "torch",
    "typeshed_client",
]
RUN = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Blocked())
from experiments.accelerator_check.__main__ import figures, main
"""


def run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", RUN + code], check=True, cwd=ROOT, env=environment)


def test_the_program_imports_nothing_beyond_the_packages_of_running_a_model():
    run("assert len(figures(main.__globals__['SIZES']['8b'])) > 10")


@pytest.mark.slow
def test_every_figure_is_measured_at_the_tiny_size(tmp_path):
    run(f"assert main(['--size', 'tiny', '--limit-s', '600', '--total-s', '1800', '--out', {str(tmp_path)!r}]) == 0")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {(row["figure"], row["name"]): row["values"] for row in rows if "values" in row}
    assert {row["figure"] for row in rows if row.get("finished")} >= {"device", "logits", "training step", "one layer"}
    assert found["logits", "converted, float32"]["max difference"] < 1e-5
    assert found["logits", "converted, float32"]["max logit"] > 0.1
    for kind in ("dense", "grouped 0.6", "pruned 0.6"):
        assert found[f"generate, {kind}", "batch 3"]["decode (tokens/s)"] > 0
    dense, grouped, int8 = (
        found[f"generate, {kind}", "weights"]["weights (GB)"] for kind in ("dense", "grouped 0.6", "grouped 0.6, int8")
    )
    assert grouped < dense
    assert 0.5 < int8 / grouped < 0.8  # one byte in place of two; here most ranks are padded to a whole group
    (step,) = (values for (figure, _), values in found.items() if figure == "training step")
    assert step["finite"] == 1
    assert found["large matrices", "refined eigenvectors, device float32, float64 refinement"]["error"] < 1e-7
    assert len([name for figure, name in found if figure == "one layer" and name.startswith("fit")]) == 7


def test_a_failed_figure_loses_no_other_and_a_second_run_measures_only_what_is_missing(tmp_path):
    asked = []

    def first(wanted):
        for name in ("a", "b"):
            if wanted(name):
                asked.append(name)
                yield name, {"seconds": 1.0}
        raise ValueError("no such device")

    def second(wanted):
        yield "c", {"seconds": 2.0}

    def slow(wanted):
        yield "d", {"seconds": 3.0}
        time.sleep(30)

    figures = {"first": first, "second": second, "slow": slow}
    records = Records(tmp_path)
    assert run_figures(records, figures, limit_s=0.3, total_s=60) == 2
    records.close()
    lines = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(lines + '{"figure": "half a li')
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["name"] for row in rows if "values" in row] == ["a", "b", "c", "d"]
    assert [row["error"] for row in rows if "error" in row] == ["ValueError: no such device"]
    assert "out of time" in next(row["skipped"] for row in rows if "skipped" in row)
    again = Records(tmp_path)
    assert run_figures(again, {**figures, "first": lambda wanted: iter(())}, limit_s=0.3, total_s=60) == 1
    again.close()
    assert asked == ["a", "b"]
    assert [row["name"] for row in again.rows if "values" in row].count("c") == 1


def test_models_of_eight_billion_parameters_have_their_sizes():
    size = SIZES["8b"]
    config = DecoderConfig.from_hf(size.generation)
    made = {name: variant() for name, variant in variants(size).items()}
    for name, variant in made.items():
        if "grouped" in name or "pruned" in name:
            keep = float(name.split()[1].rstrip(","))
            assert keep - 0.06 < variant.keep_ratio(size) <= keep, name
    assert made["dense"].keep_ratio(size) == 1.0
    assert all(group.rank % 128 == 0 for group in made["grouped 0.6"].plan.groups)
    assert made["pruned 0.5"].config.mlp_dim == pruned_width(config, 0.5, 128) == 5376
    # 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336) + 4096 x 128256, and half of 1,000 keys of attention
    exact = 2 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256 + 32 * 1000 * 4096)
    assert flops_per_token(config, None, 1000) == exact
    grouped = flops_per_token(config, grouped_plan(config, 0.6, 128), 1000)
    assert 0.55 * exact < grouped < 0.65 * exact


def test_peaks_are_those_of_the_data_sheets():
    assert peaks("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert peaks("NVIDIA H100 PCIe")[0] == 756e12
    assert peaks("TPU v5 lite")[0] == 197e12
    assert peaks("cpu") is None


def test_refinement_reaches_the_precision_of_its_products():
    matrix = second_moment(24)
    exact, _ = np.linalg.eigh(matrix)
    right = np.random.default_rng(0).standard_normal((24, 3))
    with jax.enable_x64(True):
        rough = jnp.linalg.eigh(jnp.asarray(matrix, jnp.float32))
        before = np.abs(np.asarray(rough[0], np.float64) - exact).max()
        vectors = jnp.asarray(rough[1], jnp.float64)
        for _ in range(2):
            values, vectors = refine_eigenvectors(jnp.asarray(matrix), vectors)
        assert np.abs(np.asarray(values) - exact).max() < 1e-4 * before
        np.testing.assert_allclose(np.asarray(vectors.T @ vectors), np.eye(24), atol=1e-9)
        factor = jnp.linalg.cholesky(jnp.asarray(matrix, jnp.float32))
        x = solve_refined(jnp.asarray(matrix), jnp.asarray(right), factor)
        np.testing.assert_allclose(matrix @ np.asarray(x), right, atol=1e-9)
