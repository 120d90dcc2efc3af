"""Distillation of SmolLM2-135M-Instruct from the starts of several methods, on the same tokens.

    python -m experiments.distil_smollm2.run --text wikitext2-valid.txt --out runs/distil_smollm2

The text is one file: its first 65,536 tokens calibrate, the next 32,768 are scored, the rest is trained on. Conversion
and distillation are those of `ngc-jax convert` and `ngc-jax distil`; the same command continues an interrupted run.
Takes about 10 minutes for each method and keep ratio on 2 cores, and up to 7 for its conversion. Each method has the
learning rate of its kind of start, because a model in the fixed gauge diverges at rates that work for the others;
`--rates` gives other rates, each with its own directory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ngc_jax.commands.console import console
from ngc_jax.commands.convert import ConvertConfig
from ngc_jax.commands.distil import DistilConfig
from ngc_jax.commands.evaluate import EvaluateConfig
from ngc_jax.files import write_json

# Learning rate by whether the start stores all states.
RATES = {"ngc": 1e-4, "svd_llm": 2e-4, "basis_sharing": 2e-4, "ngc_paper": 2e-4}
CALIBRATION, SCORED = 65_536, 32_768


def run_one(method: str, keep: float, text: str, steps: int, out: Path, rate: float) -> dict[str, Any]:
    """Convert and distil once; finished parts are not repeated."""
    start = out / f"{method}-{keep:g}"
    run, result = (out / f"{method}-{keep:g}-{rate:g}{end}" for end in ("-distilled", ".json"))
    if not result.exists():
        if not start.exists():
            ConvertConfig(
                out=str(start), method=method, keep=keep, text=text, calibration_tokens=CALIBRATION
            ).run()  # fmt: skip
        summary = DistilConfig(
            model=str(start),
            out=str(run),
            text=text,
            skip_tokens=CALIBRATION + SCORED,
            tokens=None,
            evaluation_text=text,
            evaluation_skip_tokens=CALIBRATION,
            evaluation_tokens=SCORED,
            steps=steps,
            # To save memory only: the gradients of both halves are added.
            microbatches=2,
            learning_rate=rate,
            warmup_steps=4,
            save_every=12,
        ).run()
        if summary["interrupted"]:
            raise KeyboardInterrupt
        write_json(result, {"method": method, "keep": keep, **summary})
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def markdown(rows: list[dict[str, Any]], dense: float) -> str:
    """A table of perplexities before and after."""
    lines = [
        "| keep | start | learning rate | one-shot | distilled | tokens | distilled / dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = list(row["perplexities"].values())
        lines.append(
            f"| {row['keep']:g} | `{row['method']}` | {row['learning_rate']:g} | {scores[0]:.3f} | {scores[-1]:.3f} | "
            f"{row['tokens_seen']:,} | {scores[-1] / dense:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _rate(text: str) -> tuple[str, float]:
    method, _, rate = text.partition("=")
    if method not in RATES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected METHOD=RATE with a method of {', '.join(RATES)}")
    return method, float(rate)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/distil_smollm2"))
    parser.add_argument("--methods", nargs="+", default=["ngc", "svd_llm", "basis_sharing"], choices=list(RATES))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.5])
    parser.add_argument("--steps", type=int, default=48, help="of 4 x 512 tokens")
    parser.add_argument("--rates", nargs="+", type=_rate, default=[], metavar="METHOD=RATE", help="learning rates")
    arguments = parser.parse_args()
    rates = RATES | dict(arguments.rates)
    arguments.out.mkdir(parents=True, exist_ok=True)
    reference = arguments.out / "dense.json"
    if not reference.exists():
        evaluation = EvaluateConfig(text=arguments.text, skip_tokens=CALIBRATION, max_tokens=SCORED).run()
        write_json(reference, evaluation)
    dense = json.loads(reference.read_text(encoding="utf-8"))["perplexity"]
    rows = []
    for keep in arguments.keep:
        for method in arguments.methods:
            rows.append(run_one(method, keep, arguments.text, arguments.steps, arguments.out, rates[method]))
            write_json(arguments.out / "results.json", {"rows": rows})
            table = markdown(rows, dense)
            (arguments.out / "results.md").write_text(table, encoding="utf-8")
            console.print(table)


if __name__ == "__main__":
    main()
