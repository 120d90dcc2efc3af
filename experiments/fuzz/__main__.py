"""Run ngc-jax on mutated inputs, and count the outcomes.

    python -m experiments.fuzz --count 10000 --seed 0 --out runs/fuzz

Every input is read by a command, in a process with limited memory. Correct is: exit code 0, or exit code 2 with one
line that says what is wrong (three for a topology: the text with a caret below it), and no partial output. Everything
else is a fault; its input is kept in OUT/faults. The process can write below a
temporary directory and OUT only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.fuzz.inputs import make_case
from ngc_jax.commands.console import Report, console, progress_bar

ROOT = Path(__file__).parents[2]
CHUNK = 200
PATIENCE = 300  # seconds for one input; a worker stops earlier by itself, unless it waits or runs code outside Python


def main(arguments: list[str] | None = None) -> int:
    """Run; returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    results: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="ngc-jax-fuzz-") as directory, progress_bar("fuzz") as bar:
        place = Path(directory)
        _worker(place, ["seeds", str(place / "seeds")])
        while len(results) < options.count:
            numbers = [len(results), min(len(results) + CHUNK, options.count)]
            log = place / "log.jsonl"
            log.write_text("", encoding="utf-8")
            kept = out / "faults"
            words = ["run", str(place / "seeds"), str(log), str(options.seed), *map(str, numbers), str(kept)]
            alive = _worker(place, words, log, partial(_advance, bar, len(results), options.count))
            done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            if not done:
                raise RuntimeError(f"the worker did not start: {(place / 'worker.log').read_text()[-500:]}")
            # The worker writes a line before an input and another after it: one without the other means that it died.
            if done[-1]["outcome"] == "begun":
                done[-1]["outcome"] = "fault: the process died" if alive else f"fault: no end within {PATIENCE} s"
                _keep(done[-1]["number"], options.seed, place / "seeds", kept)
            results += [line for line in done if line["outcome"] != "begun"]
            bar(min(len(results), options.count), options.count)
    counts = Counter((line["kind"], line["outcome"].split(":")[0]) for line in results)
    kinds = list(dict.fromkeys(line["kind"] for line in results))
    faults = [line for line in results if line["outcome"].startswith("fault")]
    table = ["| input | accepted | refused | faults |", "|---|---|---|---|"]
    for kind in kinds:
        row = [f"{counts[kind, outcome]:,}" for outcome in ("accepted", "refused", "fault")]
        table.append(f"| {kind} | {' | '.join(row)} |")
    text = "\n".join(table) + "\n"
    with (options.out / "outcomes.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in results)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    summary = {"count": len(results), "seed": options.seed, "faults": faults}
    (options.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(text)
    for line in faults[:20]:
        console.print(f"{line['number']} {line['kind']}: {line['outcome']}")
    return 1 if faults else 0


def _advance(bar: Report, before: int, total: int, finished: int) -> None:
    bar(before + finished, total)


def _keep(number: int, seed: int, seeds: Path, faults: Path) -> None:
    """Make an input again where it is kept; the worker had no time for it."""
    place = faults / str(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    case = make_case(number, seed, seeds, place)
    (place / "command.json").write_text(json.dumps(case.command), encoding="utf-8")


def _worker(
    place: Path, words: list[str], log: Path | None = None, progress: Callable[[int], None] | None = None
) -> bool:
    """Run a worker to its end; False if it was killed because its log did not change for too long."""
    (place / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "JAX_PLATFORMS": "cpu"}
    # Commands write below one directory only, to which the worker confines itself.
    environment |= {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (place / "worker.log").open("w") as output:
        command = [sys.executable, "-m", "experiments.fuzz.worker", *words]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        size, since = 0, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
                return True
            if log is None or progress is None:
                continue
            if log.stat().st_size != size:
                size, since = log.stat().st_size, time.monotonic()
                progress(log.read_text(encoding="utf-8").count("\n") // 2)
            elif time.monotonic() - since > PATIENCE:
                process.kill()
                process.wait()
                return False


if __name__ == "__main__":
    sys.exit(main())
