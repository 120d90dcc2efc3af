"""What ngc-jax does on an accelerator: correctness, speed and memory, in at most eight minutes on one device.

    python -m experiments.accelerator_check --out DIR

Every figure is written to DIR/results.jsonl as soon as it is known; one that fails does not affect the others. A second
run with the same DIR measures only what is missing. Weights are random and made on the device: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

# Before jax is imported: the largest models need more of the memory than it reserves by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

from experiments.accelerator_check import inference, linear_algebra, training
from experiments.accelerator_check.records import Figure, Records, run_figures
from experiments.accelerator_check.sizes import SIZES, Size


def figures(size: Size) -> dict[str, Figure]:
    """All figures, the most important first."""
    generation = {
        f"generate, {name}": partial(inference.generation, size, variant)
        for name, variant in inference.variants(size).items()
    }
    first = ("generate, dense", "generate, grouped 0.6", "generate, pruned 0.6", "generate, int8")
    return {
        "device": inference.device,
        "logits": inference.logits,
        **{name: generation[name] for name in first if name in generation},
        "training step": partial(training.training_step, size),
        "large matrices": partial(linear_algebra.large_matrices, size),
        "one layer": partial(linear_algebra.one_layer, size),
        **generation,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the number of figures that are missing or incomplete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator_check"))
    parser.add_argument("--size", choices=SIZES, default="8b", help="tiny runs on a CPU in well under a minute")
    parser.add_argument("--limit-s", type=float, default=90.0, help="seconds of each figure")
    parser.add_argument("--total-s", type=float, default=450.0, help="seconds of all figures")
    parser.add_argument("--only", nargs="+", help="figures whose names begin so; all by default")
    options = parser.parse_args(arguments)
    chosen = {
        name: figure
        for name, figure in figures(SIZES[options.size]).items()
        if options.only is None or name.startswith(tuple(options.only))
    }
    records = Records(options.out)
    incomplete = run_figures(records, chosen, limit_s=options.limit_s, total_s=options.total_s)
    records.print_table()
    records.close()
    return incomplete


if __name__ == "__main__":
    raise SystemExit(main())
