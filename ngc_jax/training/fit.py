"""Train and distil models as library functions: from a model and a text to a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ngc_jax.errors import UsageError
from ngc_jax.models.config import check_length, language_only
from ngc_jax.models.load import LanguageModel
from ngc_jax.tokens import as_tokens
from ngc_jax.training import sharding
from ngc_jax.training.data import Pipeline, make_pipeline
from ngc_jax.training.data_config import DataConfig
from ngc_jax.training.evaluation import perplexity_on
from ngc_jax.training.loop import Batches, HostMetrics, LoopConfig, Placed, Result
from ngc_jax.training.loop import train as run_loop
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.packing import TokenDocument
from ngc_jax.training.step import Constants, Program
from ngc_jax.training.trainable import Trainable, cast_matrices, merge_params, split_params
from ngc_jax.types import Params

# The objective of distillation: the teacher's next-token distributions.
DISTILLATION = Objective(cross_entropy=0.0, divergence=1.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: Total number of steps.
        batch_size: Rows of a step, over all devices.
        sequence_length: Tokens of a row.
        optimizer: AdamW at 1e-4 with a cosine schedule over the steps if None.
        trainable: Which parameters train: `all`, the neuron `states`, or `states_and_norms`.
        dtype: Of the computation, `bfloat16` for mixed precision; if None float32 on a CPU, else bfloat16. Parameters
            that train, their gradients and the optimiser's state are float32.
        microbatches: Number of parts that a step's rows are split into to save memory; the result is the same.
        remat: Recompute activations in the backward pass to save memory.
        parallel: jit over a named mesh, or pmap (data parallel only).
        save_every: Steps between checkpoints, if there is a directory; 0 for only after the last.
        seed: Of the order of the data and of random draws in losses.

    Example:
        >>> TrainConfig(steps=50, dtype="bfloat16").compute_dtype
        dtype(bfloat16)
    """

    steps: int = 100
    batch_size: int = 4
    sequence_length: int = 512
    optimizer: OptimizerConfig | None = None
    trainable: Trainable = "all"
    dtype: str | None = None
    microbatches: int = 1
    remat: bool = False
    parallel: sharding.Parallel = "jit"
    save_every: int = 0
    seed: int = 0

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of the computation."""
        return jnp.dtype(self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of `train` and `distil`.

    Attributes:
        model: The trained model.
        step: The last step done.
        history: Metrics of every step.
        interrupted: Whether a signal stopped it early.
    """

    model: LanguageModel
    step: int
    history: list[HostMetrics]
    interrupted: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model ready to train: the computation of a step, and its arrays.

    Attributes:
        model: The model.
        program: The computation of a step.
        trained: Parameters that train.
        constants: The others, and the teacher's.
        mesh: Of all devices.
        config: The training config.
    """

    model: LanguageModel
    program: Program
    trained: Params
    constants: Constants
    mesh: Mesh
    config: TrainConfig

    def placed(self) -> Placed:
        """The arrays on their devices, and the compiled step."""
        return Placed(self.program, self.trained, self.constants, self.mesh, self.config.parallel)

    def perplexity_on(self, tokens: np.ndarray, prefix: Sequence[int]) -> Callable[[Params], dict[str, float]]:
        """A function from trained parameters to perplexity; see `evaluation.perplexity_on`."""
        return perplexity_on(tokens, prefix, self.program.decoder, self.constants.frozen, self.mesh)

    def model_of(self, result: Result) -> LanguageModel:
        """The trained model."""
        _, frozen = split_params(self.model.params, self.config.trainable)
        params = merge_params(jax.tree.map(jnp.asarray, result.params), frozen)
        return dataclasses.replace(self.model, params=params)


def prepare(
    model: LanguageModel,
    config: TrainConfig,
    objective: Objective,
    *,
    teacher: LanguageModel | None = None,
    mesh: Mesh | None = None,
) -> Prepared:
    """Prepare a model for training.

    Args:
        model: The model.
        config: The training config.
        objective: The objective to minimise.
        teacher: The model to learn from, if the objective needs one; it is not trained.
        mesh: Of all devices; data parallel over all of them if None.

    Raises:
        UsageError: If nothing would train, the objective needs a teacher and there is none, or a model has no positions
            for the sequences.
    """
    language_only(model.config, "training")
    if model.quantised:
        raise UsageError(f"{model.name} is quantised and cannot be trained; train it before it is quantised")
    for one in (model, teacher):
        if one is not None:
            check_length(one.config, config.sequence_length)
    trained, frozen = split_params(model.params, config.trainable)
    decoder = model.decoder.clone(param_dtype=jnp.dtype("float32"), dtype=config.compute_dtype, remat=config.remat)
    optimizer = config.optimizer or OptimizerConfig(steps=config.steps)
    program = Program(
        decoder,
        objective,
        make_optimizer(optimizer),
        None if teacher is None else teacher.decoder,
        config.microbatches,
        config.seed,
    )
    constants = Constants(cast_matrices(frozen, config.compute_dtype), None if teacher is None else teacher.params)
    mesh = sharding.make_mesh() if mesh is None else mesh
    return Prepared(model, program, trained, constants, mesh, config)


def train(
    model: LanguageModel,
    data: Any,
    *,
    config: TrainConfig | None = None,
    objective: Objective | None = None,
    teacher: LanguageModel | None = None,
    directory: str | Path | None = None,
    on_metrics: Callable[[HostMetrics], None] | None = None,
) -> Trained:
    """Train a model.

    Args:
        model: The model; its arrays are not changed.
        data: A text, token ids (T,), a `DataConfig`, or batches (an iterator such as `make_pipeline` returns).
        config: The training config; `TrainConfig()` if None.
        objective: The objective to minimise; cross entropy if None.
        teacher: For objectives that need one.
        directory: Of checkpoints, from which the same call continues an interrupted run; None for none.
        on_metrics: Called with the metrics of every step, such as loss, tokens and seconds.

    Returns:
        The trained model, and the metrics of every step.

    Raises:
        UsageError: If the data are too small, nothing would train, a loss is not finite, or the checkpoints have
            another model or other settings.

    Example:
        >>> fitted = train(model, text, config=TrainConfig(steps=2, batch_size=8, sequence_length=16))
        >>> fitted.step, sorted(fitted.history[0])[:2]
        (2, ['cross_entropy', 'gradient_norm'])
    """
    config, objective = config or TrainConfig(), objective or Objective()
    prepared = prepare(model, config, objective, teacher=teacher)
    sharding.check_rows(config.batch_size, prepared.mesh)
    batches = batches_of(data, model, config)
    result = run_loop(
        prepared.placed(),
        batches,
        LoopConfig(config.steps, save_every=config.save_every),
        directory=directory,
        settings=_settings(config, objective),
        on_metrics=on_metrics,
    )
    return Trained(prepared.model_of(result), result.step, result.history, result.interrupted)


def distil(
    student: LanguageModel,
    teacher: LanguageModel,
    data: Any,
    *,
    config: TrainConfig | None = None,
    objective: Objective = DISTILLATION,
    directory: str | Path | None = None,
    on_metrics: Callable[[HostMetrics], None] | None = None,
) -> Trained:
    """Train a student on its teacher's next-token distributions (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: A compact model, usually made from the teacher by `convert`.
        teacher: The dense model; it needs the student's vocabulary.
        data: As for `train`; texts similar to those that the student will read.
        config: The training config; if None, the neuron states train if the student has any.
        objective: The objective to minimise; by default the divergence from the teacher.
        directory: As for `train`.
        on_metrics: As for `train`.

    Raises:
        UsageError: As `train`, and if the vocabularies differ.

    Example:
        >>> config = TrainConfig(steps=2, batch_size=8, sequence_length=16, trainable="states")
        >>> better = distil(compact, model, text, config=config).model
        >>> better.plan == compact.plan
        True
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(
            f"the student embeds {student.config.vocab_size:,} tokens and the teacher {teacher.config.vocab_size:,}; "
            "expected the model that the student was made from"
        )
    if config is None:
        config = TrainConfig(trainable="states" if student.plan is not None and student.plan.groups else "all")
    return train(
        student,
        data,
        config=config,
        objective=objective,
        teacher=teacher if objective.needs_teacher else None,
        directory=directory,
        on_metrics=on_metrics,
    )


def batches_of(data: Any, model: LanguageModel, config: TrainConfig) -> Batches:
    """Batches from the `data` of `train`.

    Raises:
        UsageError: If it is none of the accepted forms, or too small for a row.
    """
    if hasattr(data, "__next__") and hasattr(data, "get_state"):
        return data
    if isinstance(data, Pipeline):
        return iter(data)
    tokenizer = model.load_tokenizer()
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if isinstance(data, DataConfig):
        return iter(make_pipeline(data, tokenizer, vocab_size=model.config.vocab_size, **processes))
    tokens = as_tokens(data, model.config.vocab_size, tokenizer=tokenizer, least=2)
    rows = DataConfig(
        sources=("given",),
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    document = TokenDocument(tokens)
    given = {"given": [document]}
    return iter(make_pipeline(rows, tokenizer, vocab_size=model.config.vocab_size, given=given, **processes))


def _settings(config: TrainConfig, objective: Objective) -> dict[str, Any]:
    """The settings that a continued run must share with the original, after a round trip through JSON."""
    both = {**dataclasses.asdict(config), "objective": dataclasses.asdict(objective)}
    free = ("microbatches", "remat", "parallel", "save_every")
    return {name: _plain(value) for name, value in both.items() if name not in free}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
