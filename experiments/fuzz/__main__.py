"""Give ngc-jax mutated inputs, and count what it makes of them.

    python -m experiments.fuzz --count 10000 --seed 0 --out runs/fuzz

Every input is read by a command, in a process whose memory is limited. Right is: exit code 0, or exit code 2 with one
line that says what is wrong (of a topology three: the text and a mark below it), and nothing half written. Everything
else is a fault; its input is kept in OUT/faults. The process can write below a
temporary directory and OUT only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ngc_jax.commands.console import console, progress_bar

ROOT = Path(__file__).parents[2]
CHUNK = 200
PATIENCE = 180  # seconds for one input, on a machine that does other things too


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
            kept = str(out / "faults")
            _worker(place, ["run", str(place / "seeds"), str(log), str(options.seed), *map(str, numbers), kept])
            done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            # The worker writes a line before an input and another after it: one without the other killed the worker.
            if done and done[-1]["outcome"] == "begun":
                done[-1]["outcome"] = "fault: the process died"
            results += [line for line in done if line["outcome"] != "begun"]
            if not done:
                raise RuntimeError("the worker did not start")
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


def _worker(place: Path, words: list[str]) -> None:
    (place / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "JAX_PLATFORMS": "cpu"}
    # All that a command writes is below one directory, to which the worker confines itself.
    environment |= {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    with (place / "worker.log").open("w") as log:
        command = [sys.executable, "-m", "experiments.fuzz.worker", *words]
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)


if __name__ == "__main__":
    sys.exit(main())
