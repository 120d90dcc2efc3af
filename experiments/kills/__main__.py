"""Kill commands at random moments, run them again, and compare the results with an undisturbed run.

    python -m experiments.kills --count 50 --out runs/kills

Each command of `convert`, `distil`, `train`, `compare` and `evaluate` runs on a tiny model in its own process group,
which gets kill -9 (SIGKILL) at a moment drawn uniformly from the duration of an undisturbed run; then the same command
runs to its end. Correct is: exit code 0, the same tensors bit for bit, the same numbers except for times, and no
temporary files beside the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.fuzz.seeds import make_seeds
from ngc_jax.commands.console import console, progress_bar

COMMANDS = ("convert", "distil", "train", "compare", "evaluate")
# Entries of a summary that differ from run to run.
_VARYING = {"seconds", "tokens_per_second", "peak_bytes", "decode_tokens_per_second", "step_seconds", "cost", "out"}


def main(arguments: list[str] | None = None) -> int:
    """Run; returns 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills in all")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="ngc-jax-kills-") as directory, progress_bar("kill") as bar:
        place = Path(directory)
        make_seeds(place / "seeds")
        expected: dict[str, tuple[Any, float]] = {}
        for number in range(options.count):
            name = options.only[number % len(options.only)]
            if name not in expected:
                _run(name, place, place / f"{name}-warm")  # compiles the programs that later runs take from the cache
                began = time.perf_counter()
                result = _run(name, place, place / f"{name}-whole")
                expected[name] = (result, time.perf_counter() - began)
            result, seconds = expected[name]
            moment = rng.uniform(0.2, 1.0) * seconds
            rows.append({"command": name, "after": moment, "of": seconds, **_kill(name, place, moment, result)})
            bar(number + 1, options.count)
    (options.out / "results.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    for name in options.only:
        mine = [row for row in rows if row["command"] == name]
        wrong = [row["fault"] for row in mine if row["fault"]]
        console.print(
            f"{name}: {len(mine)} kills, {sum(row['hit'] for row in mine)} before the end, {len(wrong)} faults"
        )
        for fault in wrong:
            console.print(f"  {fault}")
    return 1 if any(row["fault"] for row in rows) else 0


def _command(name: str, place: Path, out: Path) -> list[str]:
    seeds = place / "seeds"
    text = ["--text", str(seeds / "text.txt")]
    few = ["--window", "32", "--calibration-tokens", "256", "--gradient-tokens", "128", "--propagation-tokens", "128"]
    steps = ["--steps", "30", "--save-every", "5", "--evaluate-every", "10", "--batch-size", "2", "--sequence-length"]
    steps += ["16", "--evaluation-text", str(seeds / "text.txt"), "--evaluation-tokens", "64", "--data", "1"]
    scored = ["--evaluation-text", str(seeds / "text.txt"), "--max-tokens", "256"]
    words = {
        "convert": ["convert", str(seeds / "dense"), *text, *few, "--overwrite", "--keep", "0.8"],
        "distil": ["distil", str(seeds / "compact"), "--teacher", str(seeds / "dense"), *text, *steps],
        "train": ["train", "--tokenizer", str(seeds / "dense"), *text, *steps, "--architecture", _SMALL],
        "compare": ["compare", str(seeds / "dense"), *text, *few, *scored, "--keep", "0.8", "0.6"],
        "evaluate": ["evaluate", str(seeds / "dense"), *text, "--window", "32"],
    }[name]
    output = ["--json", str(out / "result.json")] if name == "evaluate" else ["--out", str(out / "result")]
    return [sys.executable, "-m", "ngc_jax", *words, *output]


_SMALL = (
    "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}"
)


def _start(name: str, place: Path, out: Path) -> subprocess.Popen[bytes]:
    out.mkdir(exist_ok=True)
    quiet = subprocess.DEVNULL
    # One device, whatever the caller's environment says.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(place / "cache")
    command = _command(name, place, out)
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment, start_new_session=True)


def _run(name: str, place: Path, out: Path) -> Any:
    code = _start(name, place, out).wait()
    if code:
        raise RuntimeError(f"{name} ended with {code}: {' '.join(_command(name, place, out))}")
    return _result(name, out)


def _kill(name: str, place: Path, moment: float, expected: Any) -> dict[str, Any]:
    """Kill a run at a moment, run it again, and report differences in its result."""
    out = place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    process = _start(name, place, out)
    time.sleep(moment)
    hit = process.poll() is None
    if hit:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    try:
        found = _run(name, place, out)
    except RuntimeError as error:
        return {"hit": hit, "fault": str(error)}
    if found != expected:
        return {"hit": hit, "fault": f"after {moment:.2f} s another result: {_difference(expected, found)}"}
    left = sorted(path.name for path in out.iterdir() if path.name not in ("result", "result.json"))
    return {"hit": hit, "fault": f"{left[0]} was left behind" if left else ""}


def _result(name: str, out: Path) -> Any:
    """The result of a run, in a form that can be compared."""
    if name == "evaluate":
        return _lasting(json.loads((out / "result.json").read_text(encoding="utf-8")))
    if name == "compare":
        return _lasting(json.loads((out / "result" / "results.json").read_text(encoding="utf-8")))
    model = out / "result" if name == "convert" else out / "result" / "model"
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in model.glob("*.safetensors")}
    if name == "convert":
        return {"files": files}
    lines = (out / "result" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"files": files, "metrics": [_lasting(json.loads(line)) for line in lines]}


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lasting(part) for name, part in value.items() if name not in _VARYING}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def _difference(expected: Any, found: Any, path: str = "") -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                return _difference(expected.get(name), found.get(name), f"{path}/{name}")
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for place, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one != other:
                return _difference(one, other, f"{path}/{place}")
    return f"{path}: {str(expected)[:80]} became {str(found)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
