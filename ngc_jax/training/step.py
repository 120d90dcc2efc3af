"""One training step: a pure function of the state and a batch, the same on one device and on a pod."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from ngc_jax.errors import UsageError
from ngc_jax.models.decoder import Decoder
from ngc_jax.training.losses import Batch, Objective, objective_sums
from ngc_jax.training.trainable import merge_params
from ngc_jax.types import Params

Metrics = dict[str, Array]


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
        step: Steps done, () int32.
        params: The parameters that train, float32.
        opt_state: The optimiser's.
    """

    step: Array
    params: Any
    opt_state: Any


class Constants(struct.PyTreeNode):
    """Arrays that a step reads and does not change; not in checkpoints.

    Attributes:
        frozen: The student's parameters that do not train.
        teacher: The teacher's parameters; None without one.
    """

    frozen: Any
    teacher: Any = None


@dataclasses.dataclass(frozen=True)
class Program:
    """The computation of a step, without arrays.

    Attributes:
        decoder: The student; its `dtype` is the type of the computation, to which it casts parameters at their use.
        objective: The objective to minimise.
        optimizer: Updates the parameters.
        teacher: The teacher's decoder; None without one.
        microbatches: Number of parts that a batch is split into, one after the other, to save memory; the result is the
            same.
        seed: Of the stability loss's random draws, which differ in each step.
    """

    decoder: Decoder
    objective: Objective
    optimizer: optax.GradientTransformation
    teacher: Decoder | None = None
    microbatches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise UsageError(f"microbatches is {self.microbatches}; expected at least 1")
        if self.objective.needs_teacher and self.teacher is None:
            raise UsageError("this objective needs a teacher; give one")


def init_state(program: Program, trained: Params) -> TrainState:
    """The state before the first step.

    Args:
        program: The program.
        trained: Parameters that train, of any float type; stored in float32.
    """
    # A copy even of float32 arrays: the step donates its state, and the caller's arrays must remain valid.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), dict(trained))
    return TrainState(jnp.zeros((), jnp.int32), params, program.optimizer.init(params))


def loss_sums(
    program: Program, trained: Params, constants: Constants, batch: Batch, step: Array | int = 0
) -> tuple[Array, tuple[Array, Metrics]]:
    """The objective's sum over a batch, then the count and each loss's sum; see `losses.objective_sums`.

    Random draws depend on the program's seed and the step: they are the same on every device, in every microbatch, and
    after a restart.
    """
    params = merge_params(trained, constants.frozen)
    teacher = None if program.teacher is None else (program.teacher, constants.teacher)
    key = jax.random.fold_in(jax.random.key(program.seed), step) if program.objective.stability > 0 else None
    total, count, sums = objective_sums(program.objective, program.decoder, params, batch, teacher, key=key)
    return total, (count, sums)


def gradient_sums(
    program: Program, trained: Params, constants: Constants, batch: Batch, step: Array | int = 0
) -> tuple[Any, Array, Metrics]:
    """Gradient of the objective's sum, the count, and the sums; microbatch by microbatch.

    Args:
        program: The program.
        trained: Parameters that train.
        constants: The others.
        batch: Arrays (B, L), B a multiple of the number of microbatches.
        step: Steps done before this one.
    """

    def of_part(part: Batch) -> tuple[Any, Array, Metrics]:
        differentiate = jax.value_and_grad(lambda p: loss_sums(program, p, constants, part, step), has_aux=True)
        (total, (count, sums)), gradient = differentiate(trained)
        return gradient, count, {"loss": total, **sums}

    parts = program.microbatches
    if parts == 1:
        return of_part(batch)
    rows = next(iter(batch.values())).shape[0]
    if rows % parts:
        raise UsageError(f"{rows} rows of a batch cannot be cut into {parts} microbatches; choose a divisor")
    # Every n-th row, so that each microbatch has an equal part of every device's rows.
    cut = {name: jnp.swapaxes(x.reshape(rows // parts, parts, -1), 0, 1) for name, x in batch.items()}

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, cut)[0]


def train_step(
    program: Program, state: TrainState, constants: Constants, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One step.

    If the loss or the gradient is not finite, the parameters are not changed and `finite` is 0.

    Args:
        program: The computation; static under jit.
        state: Before the step.
        constants: Arrays that do not change.
        batch: Arrays (B, L); under pmap a device's rows.
        axis_name: Of pmap, over which sums are added; None under jit, where sums over a sharded batch are global.

    Returns:
        The state after the step, and float32 scalars: loss and each loss by name (means per counted token), tokens
        (counted), gradient_norm, finite.
    """
    gradient, count, sums = gradient_sums(program, state.params, constants, batch, state.step)
    if axis_name is not None:
        gradient, count, sums = jax.lax.psum((gradient, count, sums), axis_name)
    divisor = jnp.maximum(count, 1.0)
    gradient = jax.tree.map(lambda leaf: leaf / divisor, gradient)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
    updates, opt_state = program.optimizer.update(gradient, state.opt_state, state.params)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    kept = state.replace(step=state.step + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    metrics = {name: value / divisor for name, value in sums.items()}
    return new, {**metrics, "tokens": count, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}


TrainStep = Callable[[TrainState, Constants, Batch], tuple[TrainState, Metrics]]


def jit_step(program: Program, *, state_shardings: Any = None, replicated: Any = None) -> TrainStep:
    """`train_step` compiled for arrays with their own shardings; the state is donated.

    Args:
        program: The computation.
        state_shardings: Of the state after the step; chosen by the compiler if None. Give it, so that the output state
            has the same sharding as the input.
        replicated: Sharding of the metrics.
    """
    shardings: dict[str, Any] = {} if state_shardings is None else {"out_shardings": (state_shardings, replicated)}

    def step(state: TrainState, constants: Constants, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(program, state, constants, batch)

    return jax.jit(step, donate_argnums=0, **shardings)


def pmap_step(program: Program) -> TrainStep:
    """`train_step` by pmap: arguments have a leading axis of local devices; data parallel only."""

    def step(state: TrainState, constants: Constants, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(program, state, constants, batch, axis_name="devices")

    return jax.pmap(step, axis_name="devices", donate_argnums=0)
