"""`ngc-jax evaluate --task`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngc_jax.commands.console import console, progress_bar, table
from ngc_jax.commands.convert import check_positive
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.documents import document_key, read_documents
from ngc_jax.evaluation.pairs import Pair, Run, check_same_documents, compare_runs, read_run
from ngc_jax.evaluation.run_tasks import RunOptions, TaskResult, run_task
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.specs import Document, GenerationSpec, PerplexitySpec, Spec
from ngc_jax.evaluation.tasks import read_task
from ngc_jax.models.fingerprint import fingerprint
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import load_from_source
from ngc_jax.models.sources import open_source

if TYPE_CHECKING:
    from ngc_jax.commands.evaluate import EvaluateConfig

# What replaces entries of a task, of any metric and of generated answers.
_SHARED = ("shots", "chat", "system")
_GENERATION = ("max_new_tokens", "think_end", "samples", "temperature", "top_p", "seed")
# The options that need a task.
OPTIONS = (*_SHARED, *_GENERATION, "data", "limit", "out", "against")


def run(config: EvaluateConfig, task: str) -> dict[str, Any]:
    """Evaluate a model on a task and print its scores; returns the summary."""
    check_positive(batch_size=config.batch_size, limit=1 if config.limit is None else config.limit)
    spec = _spec(config, task)
    data = config.data or spec.source
    if data is None:
        raise UsageError(f"the task {spec.name} names no documents; give them with --data")
    documents = read_documents(data)
    if config.limit is not None:
        documents = documents[: config.limit + spec.shots]
    out = Path(config.out or f"runs/evaluate/{spec.name}")
    if config.against is not None and isinstance(spec, PerplexitySpec):
        raise UsageError("perplexities of two runs are not compared document by document; leave out --against")
    other = _other_run(config, out, documents[spec.shots :])
    with open_source(config.model, tokenizer=config.tokenizer) as source, progress_bar("load") as bar:
        settings = {
            "model": fingerprint(source),
            "tokenizer": config.tokenizer,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
        }
        model = load_from_source(source, dtype=config.dtype, param_dtype=config.param_dtype, progress=bar)
    parameters, model = model.count_parameters(), inference_model(model)
    with progress_bar("evaluate") as bar:
        result = run_task(
            model,
            spec,
            documents,
            out,
            settings=settings,
            how=RunOptions(config.batch_size, config.bos, config.overwrite),
            progress=lambda stage, done, total: bar(done, total, stage),
        )
    _print_scores(spec, result)
    summary = {
        "model": config.model,
        "tokenizer": config.tokenizer,
        "data": data,
        "shots": spec.shots,
        "settings": spec.settings(),
        "bos": config.bos,
        "out": str(out),
        **result.summary(),
        "parameters": parameters,
    }
    if other is not None:
        pairs = compare_runs(result.run, other)
        _print_pairs(pairs, str(config.against))
        summary["against"] = {
            "out": config.against,
            "scores": {name: pair.summary() for name, pair in pairs.items()},
        }
    return summary


def _spec(config: EvaluateConfig, task: str) -> Spec:
    """The task, with what the command line says in place of its own."""
    spec = read_task(task)
    given = {
        name: getattr(config, name)
        for name in (*_SHARED, *_GENERATION)
        if getattr(config, name) is not None and not (name == "chat" and not config.chat)
    }
    unused = [name for name in _GENERATION if name in given]
    if unused and not isinstance(spec, GenerationSpec):
        raise UsageError(
            f"--{unused[0].replace('_', '-')} is of generated answers, and the answers of {spec.name} are given; "
            "leave it out"
        )
    if isinstance(spec, GenerationSpec) and config.samples is not None:
        given["pass_at"] = tuple(k for k in spec.pass_at if k <= config.samples)
    return dataclasses.replace(spec, **given)


def _other_run(config: EvaluateConfig, out: Path, scored: list[Document]) -> Run | None:
    """The run to compare with; refused before any work is done if its documents are others."""
    if config.against is None:
        return None
    if Path(config.against).resolve() == out.resolve():
        raise UsageError(f"--against {config.against} is the --out of this run; name another run")
    other = read_run(config.against)
    check_same_documents([document_key(document) for document in scored], other.documents, config.against)
    return other


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _print_scores(spec: Spec, result: TaskResult) -> None:
    shown: Mapping[str, Sum] = result.scores
    if result.truncated is not None:
        shown = {**shown, "truncated": result.truncated}
    rows = [
        [name, score.show(score.mean), " to ".join(map(score.show, score.interval))] for name, score in shown.items()
    ]
    if result.tokens is not None:
        rows.append(["tokens per answer", f"{result.tokens:,.1f}", ""])
    title = f"{spec.name}, {result.documents:,} documents, {spec.shots} shots" + (", chat" if spec.chat else "")
    if isinstance(spec, GenerationSpec) and spec.temperature:
        title += f", {spec.samples} sample{'s' if spec.samples > 1 else ''} at temperature {spec.temperature:g}"
    console.print(table(title, ["score", "mean", "95 % interval"], rows))
    if result.cut:
        console.print(f"{result.cut:,} prompts were too long for the model and lost their first tokens")


def _print_pairs(pairs: Mapping[str, Pair], other: str) -> None:
    rows = [
        [
            name,
            _percent(pair.other),
            f"{100 * pair.difference:+.1f}",
            f"{100 * pair.interval[0]:+.1f} to {100 * pair.interval[1]:+.1f}",
            f"{pair.better:,}/{pair.worse:,}",
            "" if pair.p_value is None else f"{pair.p_value:.3g}",
        ]
        for name, pair in pairs.items()
    ]
    columns = ["score", "other", "difference", "95 % interval", "better/worse", "p"]
    console.print(table(f"against {other}, on the same documents; p of the exact McNemar test", columns, rows))
