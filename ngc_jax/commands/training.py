"""The shared part of `ngc-jax distil` and `ngc-jax train`: options, and a run from a loaded to a saved model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.training.data import Pipeline
    from ngc_jax.training.fit import TrainConfig
    from ngc_jax.training.losses import Objective
    from ngc_jax.training.optimizer import OptimizerConfig
    from ngc_jax.training.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run.

    Args:
        out: Directory of the run; the model is in OUT/model.
        text: Training text: a file, pydoc:first-half (needs no network), hub:NAME:CONFIG:SPLIT, reasoning-gym:TASK, or
            "sampled" for text that the teacher generates; see docs/data.md.
        data_options: How text becomes rows, for example "{packing: pack}"; with "sources", several in place of text.
        skip_tokens: Number of tokens to skip at the start of the text.
        tokens: Number of tokens of the text to train on, repeatedly; all by default.
        evaluation_text: Text on which perplexity is measured.
        evaluation_skip_tokens: Number of its first tokens to skip.
        evaluation_tokens: Number of tokens to score, fewer if the text is shorter; 0 for no evaluation.
        evaluate_every: Steps between evaluations; 0 for only before and after.
        steps: Total number of steps.
        batch_size: Rows of a step, over all devices; by default 4, rounded up to a multiple of the devices that
            the batch is sharded over.
        sequence_length: Tokens of a row.
        microbatches: Number of parts that a step's rows are split into to save memory; the result is the same.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which the learning rate rises.
        schedule: Decay of the learning rate after that: cosine or linear; or constant.
        final_fraction: Final learning rate relative to the peak.
        optimizer: Any of optax's optimisers, by name.
        optimizer_options: Its further options, for example "{b2: 0.99}".
        clip_norm: Maximum global norm of a gradient.
        learning_rate_scales: Factors of the learning rate by regular expressions of parameter paths.
        dtype: Of the computation: bfloat16 for mixed precision, in which parameters that train, gradients and the
            optimiser's state are still float32; or float32. By default float32 on CPU and bfloat16 elsewhere.
        remat: Recompute each layer in the backward pass to save memory.
        parallel: jit over a mesh, or pmap (data parallel only).
        data: Devices along the mesh's axis data; -1 for all remaining ones.
        fsdp: Devices along fsdp, which shards batch and parameters.
        tensor: Devices along tensor, which shards heads and MLP neurons.
        save_every: Steps between checkpoints; 0 for only at the end or when interrupted.
        keep_checkpoints: Number of checkpoints to keep.
        bos: Start of each row and document: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        seed: Of the rows' order, and of the stability loss's random draws.
        dry_run: Compile, print memory and shardings, train nothing.
        profile: Directory for a profile of three steps.
        coordinator: Address host:port of process 0, for several processes; or "auto" if the cluster provides it.
        process_count: Number of processes, with a coordinator's address.
        process_index: Index of this process.
        json: Also write the summary to this file.
    """

    out: str | None = None
    text: str = "pydoc:first-half"
    data_options: dict[str, Any] | None = None
    skip_tokens: int = 0
    tokens: int | None = None
    evaluation_text: str = "pydoc:second-half"
    evaluation_skip_tokens: int = 0
    evaluation_tokens: int = 16_384
    evaluate_every: int = 0
    steps: int = 50
    batch_size: int | None = None
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
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: bool = False
    parallel: Literal["jit", "pmap"] = "jit"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    save_every: int = 0
    keep_checkpoints: int = 3
    bos: Literal["auto", "always", "never"] = "auto"
    seed: int = 0
    dry_run: bool = False
    profile: str | None = None
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    json: str | None = None

    def start(self) -> None:
        """Join the other processes if there are any; before any other use of a device."""
        from ngc_jax.training.distributed import start_processes

        start_processes(self.coordinator, self.process_count, self.process_index)

    def check(self) -> None:
        """Raises UsageError for errors that can be found before a model is loaded."""
        from ngc_jax.files import check_output
        from ngc_jax.training import sharding
        from ngc_jax.training.optimizer import make_optimizer

        if self.out is None:
            raise UsageError("no output directory is given; add --out DIR, for example --out runs/train")
        out = Path(self.out)
        for directory in (out, out / "checkpoints", out / "tensorboard"):
            if directory.exists() and not directory.is_dir():
                raise UsageError(f"{directory} is a file; choose another --out")
        check_output(out / "model", overwrite=True)
        if self.profile is not None and not self.dry_run:
            Path(self.profile).mkdir(parents=True, exist_ok=True)
        make_optimizer(self.optimizer_config())
        self.loop()
        mesh = sharding.make_mesh(self.data, self.fsdp, self.tensor)
        sharding.check_rows(self.rows_of_a_step, mesh)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock OUT for this run; process 0 locks it for all processes of a run, and a dry run writes nothing.

        Raises:
            UsageError: If another run is using it.
        """
        import jax

        from ngc_jax.files import lock_directory

        assert self.out is not None
        if self.dry_run or jax.process_index() != 0:
            yield
            return
        with lock_directory(self.out):
            yield

    def resolved_dtype(self, backend: str) -> str:
        """The type of the computation."""
        return self.dtype or ("float32" if backend == "cpu" else "bfloat16")

    @property
    def rows_of_a_step(self) -> int:
        """The given batch size, or the first multiple of the devices along the batch that is at least 4."""
        import jax

        if self.batch_size is not None:
            return self.batch_size
        split = self.data * self.fsdp if self.data > 0 else len(jax.devices()) // self.tensor
        return -(-4 // max(split, 1)) * max(split, 1)

    def optimizer_config(self) -> OptimizerConfig:
        """The optimiser.

        Raises:
            UsageError: If an option of it is out of range.
        """
        from ngc_jax.training.optimizer import OptimizerConfig

        return OptimizerConfig(
            self.optimizer,
            self.learning_rate,
            self.optimizer_options or {},
            self.schedule,
            min(self.warmup_steps, self.steps),
            self.steps,
            self.final_fraction,
            self.clip_norm,
            self.learning_rate_scales or {},
        )

    def config(self, trainable: Trainable) -> TrainConfig:
        """The library's training config."""
        import jax

        from ngc_jax.training.fit import TrainConfig

        return TrainConfig(
            self.steps,
            self.rows_of_a_step,
            self.sequence_length,
            self.optimizer_config(),
            trainable,
            self.resolved_dtype(jax.default_backend()),
            self.microbatches,
            self.remat,
            self.parallel,
            self.save_every,
            self.seed,
        )

    def loop(self) -> Any:
        """The loop's part of the options."""
        from ngc_jax.training.loop import LoopConfig

        return LoopConfig(
            self.steps,
            evaluate_every=self.evaluate_every,
            save_every=self.save_every,
            keep=self.keep_checkpoints,
            profile=self.profile,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that a continued run must share with the original: all that change the computation."""
        settings = {**dataclasses.asdict(self), "batch_size": self.rows_of_a_step}
        return {name: _plain(value) for name, value in settings.items() if name not in _FREE}

    def fitted_to(self, rows: Pipeline) -> Self:
        """The same options with the steps limited by the data; prints any change."""
        from ngc_jax.commands.console import console

        options = self
        if rows.steps is not None and rows.steps < self.steps:
            console.print(f"the data end after {rows.steps:,} of {self.steps:,} steps, and so does the run")
            options = dataclasses.replace(self, steps=rows.steps)
        if options.warmup_steps > options.steps:
            console.print(f"the warm-up of {options.warmup_steps:,} steps is cut to the run's {options.steps:,}")
        return options

    def train(
        self,
        model: LanguageModel,
        objective: Objective,
        *,
        teacher: LanguageModel | None = None,
        trainable: Trainable = "all",
        made_of: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Train a loaded model, save it in OUT/model, and return the summary.

        Args:
            model: In float32.
            objective: The objective to minimise.
            teacher: The model to compare with.
            trainable: Which parameters train.
            made_of: Fingerprints of the models that the run begins with, by their role; a run does not continue with
                others.

        Raises:
            UsageError: If the texts are too short, or the loss is not finite.
        """
        import jax

        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.commands.convert import text_tokens
        from ngc_jax.commands.dry_run import dry_run
        from ngc_jax.commands.training_rows import prefix_of, rows_of
        from ngc_jax.models.save import save_model
        from ngc_jax.tokens import check_ids
        from ngc_jax.training import sharding
        from ngc_jax.training.fit import prepare
        from ngc_jax.training.loop import train
        from ngc_jax.training.metrics import MetricsWriter

        started = time.perf_counter()
        tokenizer = model.load_tokenizer()
        rows = rows_of(self, tokenizer, model.config.vocab_size, teacher)
        options = self.fitted_to(rows)
        batches = iter(rows)
        prepared = prepare(
            model,
            options.config(trainable),
            objective,
            teacher=teacher,
            mesh=sharding.make_mesh(options.data, options.fsdp, options.tensor),
        )
        if options.dry_run:
            return dry_run(prepared.placed(), batches)
        evaluate = None
        if options.evaluation_tokens:
            held_out = text_tokens(
                options.evaluation_text, tokenizer, options.evaluation_skip_tokens, options.evaluation_tokens
            )
            check_ids(held_out, model.config.vocab_size)
            evaluate = prepared.perplexity_on(held_out, prefix_of(options, tokenizer))
        assert options.out is not None
        directory = Path(options.out)
        with MetricsWriter(directory) as writer, progress_bar("train") as bar:

            def on_metrics(metrics: dict[str, float]) -> None:
                writer.write(metrics)
                step = int(metrics["step"])
                if "loss" in metrics:
                    rate = metrics["tokens"] / metrics["seconds"]
                    bar(step, options.steps, f"train, loss {metrics['loss']:.3f}, {rate:,.0f} tokens/s")
                if "perplexity" in metrics:
                    console.print(f"step {step}: perplexity {metrics['perplexity']:.3f}")

            result = train(
                prepared.placed(),
                batches,
                options.loop(),
                directory=directory / "checkpoints",
                settings={**options.settings(), **(made_of or {})},
                evaluate=evaluate,
                on_metrics=on_metrics,
                on_start=writer.continue_after,
            )
        # Of the whole run, including the steps of earlier processes.
        history = writer.entries() or result.history
        seconds = [metrics["seconds"] for metrics in result.history if "loss" in metrics][2:]
        summary: dict[str, Any] = {
            **options.settings(),
            "out": options.out,
            "prefix": list(prefix_of(options, tokenizer)),
            "step": result.step,
            "interrupted": result.interrupted,
            "parameters": model.count_parameters(),
            "tokens_seen": result.step * options.rows_of_a_step * options.sequence_length,
            "perplexities": {int(m["step"]): m["perplexity"] for m in history if "perplexity" in m},
            "losses": [m["loss"] for m in history if "loss" in m],
            "step_seconds": statistics.median(seconds) if seconds else None,
            "seconds": time.perf_counter() - started,
        }
        if result.interrupted:
            console.print(f"stopped after step {result.step} of {options.steps}; the same command continues")
            return summary
        if result.step < options.steps:
            console.print(f"the data ended after step {result.step} of {options.steps}; the run ends with them")
        if jax.process_index() == 0:
            final = prepared.model_of(result)
            if model.plan is not None:
                trained_on = {"text": Path(options.text).name, "tokens": summary["tokens_seen"], "trainable": trainable}
                final = dataclasses.replace(final, conversion={**(model.conversion or {}), "training": trained_on})
            save_model(final, str(directory / "model"), overwrite=True, card=_card(final, options, summary, trainable))
        console.print(f"{directory / 'model'}: {summary['tokens_seen']:,} tokens in {summary['seconds']:.0f} s")
        return summary


# Options about where and how a run is executed, which do not change its computation.
_FREE = {"out", "json", "dry_run", "profile", "coordinator", "process_count", "process_index", "save_every"}
_FREE |= {"keep_checkpoints", "evaluate_every", "parallel", "data", "fsdp", "tensor", "microbatches", "remat"}
_FREE |= {"evaluation_text", "evaluation_tokens", "evaluation_skip_tokens"}


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return list(value) if isinstance(value, tuple) else value


def _card(model: LanguageModel, options: TrainingOptions, summary: dict[str, Any], trainable: str) -> str:
    from ngc_jax.models.card import Measured, model_card

    perplexity = summary["perplexities"].get(summary["step"])
    measured = None if perplexity is None else Measured(Path(options.evaluation_text).name, perplexity)
    training = (
        f"Trained on {summary['tokens_seen']:,} tokens of {Path(options.text).name} ({options.steps} steps of "
        f"{options.rows_of_a_step} x {options.sequence_length}, {options.optimizer} at {options.learning_rate:g}, "
        f"training {trainable})."
    )
    return model_card(model, Path(options.out or "").name, training=training, measured=measured)
