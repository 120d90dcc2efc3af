"""The training loop: from batches and a program to a trained state, on any mesh, interruptible at any time."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ngc_jax.errors import UsageError
from ngc_jax.training import sharding
from ngc_jax.training.checkpoints import Checkpoints
from ngc_jax.training.step import Constants, Program, TrainState, TrainStep, init_state, jit_step, pmap_step
from ngc_jax.types import Params

HostMetrics = dict[str, float]


class Batches(Protocol):
    """An iterator over this process's rows, usually endless.

    Its position covers all processes, which take the same number of batches; it can be continued with another number of
    processes.
    """

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Itself."""
        ...

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Arrays (B / processes, L)."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Position, JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The length of training, and its evaluations and checkpoints.

    Attributes:
        steps: Total number of steps, including those before a restored checkpoint.
        evaluate_every: Steps between evaluations; 0 for only before the first and after the last step.
        save_every: Steps between checkpoints; 0 for only after the last.
        keep: Number of checkpoints to keep.
        profile: Directory for a trace of the fourth to the sixth step that this process takes; None for none.
    """

    steps: int
    evaluate_every: int = 0
    save_every: int = 0
    keep: int = 3
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.keep < 1 or self.evaluate_every < 0 or self.save_every < 0:
            raise UsageError("steps and keep must be at least 1, evaluate_every and save_every at least 0")


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of `train`.

    Attributes:
        params: The trained parameters, float32; on the host, not sharded.
        step: The last step done.
        history: Metrics of every step of this run, and of every evaluation.
        interrupted: Whether a signal stopped it early.
    """

    params: Params
    step: int
    history: list[HostMetrics]
    interrupted: bool


class Placed:
    """A program's arrays on its devices, and its compiled step."""

    def __init__(
        self, program: Program, trained: Params, constants: Constants, mesh: Mesh, parallel: sharding.Parallel = "jit"
    ):
        """Place the arrays.

        Args:
            program: The computation of a step.
            trained: Parameters that train.
            constants: The others.
            mesh: Of all devices.
            parallel: jit over a named mesh, or pmap (data parallel only).

        Raises:
            UsageError: If parameters cannot be sharded over the mesh, or pmap would have to shard them.
        """
        self.mesh, self.parallel = mesh, parallel
        shapes = jax.eval_shape(lambda p: init_state(program, p), trained)
        if parallel == "pmap":
            if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
                raise UsageError("pmap is data parallel only: fsdp and tensor must be 1; choose --parallel jit")
            self.state = sharding.stack_for_pmap(jax.device_get(init_state(program, trained)))
            self.constants = sharding.stack_for_pmap(jax.device_get(constants))
            self.step: TrainStep = pmap_step(program)
            return
        self.shardings = sharding.state_shardings(shapes, program.optimizer, mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = sharding.put(trained, self.shardings.params)
        self.state = jax.jit(lambda p: init_state(program, p), out_shardings=self.shardings)(placed)
        self.constants = Constants(
            *(
                None if part is None else sharding.put(part, sharding.params_shardings(part, mesh))
                for part in (constants.frozen, constants.teacher)
            )
        )
        self.step = jit_step(program, state_shardings=self.shardings, replicated=everywhere)

    def batch(self, rows: Mapping[str, np.ndarray]) -> Any:
        """Put a process's rows where the step reads them."""
        return sharding.split_for_pmap(rows) if self.parallel == "pmap" else sharding.put_batch(rows, self.mesh)

    @property
    def single(self) -> TrainState:
        """The state without pmap's axis, on all devices of all processes."""
        if self.parallel == "jit":
            return self.state
        state = self._first()
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return sharding.put(state, jax.tree.map(lambda _: everywhere, state))

    def _first(self) -> TrainState:
        """The first local device's copy of pmap's state, on the host."""
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], self.state)

    def set_single(self, state: TrainState) -> None:
        """Continue from a state."""
        if self.parallel == "pmap":
            state = sharding.stack_for_pmap(jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state))
        self.state = state

    def host_params(self) -> Params:
        """The trained parameters on every host, not sharded."""
        if self.parallel == "pmap":
            params = self._first().params
        elif jax.process_count() > 1:
            params = multihost_utils.process_allgather(self.state.params, tiled=True)
        else:
            params = jax.device_get(self.state.params)
        host: Params = params
        return host


def train(
    placed: Placed,
    batches: Batches,
    config: LoopConfig,
    *,
    directory: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], HostMetrics] | None = None,
    on_metrics: Callable[[HostMetrics], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Result:
    """Train, or continue training.

    Args:
        placed: The arrays before the first step, and the compiled step; not to be used again.
        batches: Rows; set to the position of the checkpoint if there is one.
        config: The loop's config.
        directory: Of checkpoints; None for none.
        settings: JSON, stored with checkpoints; a checkpoint made with other settings is refused.
        evaluate: From the trained parameters, on the devices, to numbers; called as `config` says.
        on_metrics: Called with the metrics of every step, one step late, and of every evaluation.
        on_start: Called with the step that the run begins after, 0 or a checkpoint's. An evaluation that is due after
            that same step is made again.

    Returns:
        The result. After SIGTERM or SIGINT a checkpoint is saved and `interrupted` is true. If the batches end before
        the steps do, so does the run.

    Raises:
        UsageError: If the loss is not finite, with the step; or a checkpoint does not fit.
    """
    settings, history = dict(settings or {}), []

    def report(metrics: HostMetrics) -> None:
        history.append(metrics)
        if on_metrics is not None:
            on_metrics(metrics)

    keeper = None if directory is None else Checkpoints(directory, keep=config.keep)

    def save() -> None:
        if keeper is not None:
            keeper.save(placed.single, batches.get_state(), settings)

    def look(step: int) -> None:
        if evaluate is not None:
            if keeper is not None:
                keeper.wait()  # an evaluation may end the process, for example out of memory
            report({"step": step, **evaluate(placed.single.params)})

    with stop_signals() as stopped, keeper or _nothing(), _Trace(config.profile) as trace:
        step = _restore(keeper, placed, batches, settings)
        if on_start is not None:
            on_start(step)
        looked = -1
        if step == 0 or (config.evaluate_every and step % config.evaluate_every == 0):
            look(step)
            looked = step
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        began = time.perf_counter()
        interrupted = step < config.steps and _agreed(stopped)
        while step < config.steps and not interrupted:
            trace.before_step()
            try:
                rows = next(batches, None)
            except Exception:
                # All steps before this one are good. With several processes the others may have their rows.
                if waiting is not None and jax.process_count() == 1:
                    _take(waiting, began, report, keeper)
                    save()
                raise
            if rows is None:
                break
            placed.state, metrics = placed.step(placed.state, placed.constants, placed.batch(rows))
            step += 1
            # Reading the metrics of a step waits for it; one step later the next one is already running.
            if waiting is not None:
                began = _take(waiting, began, report, keeper)
            waiting = (step, metrics)
            trace.after_step(placed.state)
            interrupted = _agreed(stopped)
            evaluates = config.evaluate_every and step % config.evaluate_every == 0
            saves = config.save_every and step % config.save_every == 0
            if interrupted or evaluates or saves or step == config.steps:
                began = _take(waiting, began, report, keeper)
                waiting = None
                # First, because an evaluation takes long and may fail.
                save()
                if evaluates and not interrupted:
                    look(step)
                    looked = step
                    interrupted = step < config.steps and _agreed(stopped)
                began = time.perf_counter()
        if waiting is not None:  # the batches have ended
            _take(waiting, began, report, keeper)
            save()
        if not interrupted and looked != step:
            look(step)
        return Result(placed.host_params(), step, history, interrupted)


class _Trace:
    """A profile of the fourth to the sixth step of this process; a context manager that ends it if a run is shorter."""

    def __init__(self, directory: str | None) -> None:
        self._directory, self._steps, self._running = directory, 0, False

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def before_step(self) -> None:
        if self._directory is not None and self._steps == 3:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after_step(self, state: TrainState) -> None:
        self._steps += 1
        if self._running and self._steps == 6:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _restore(keeper: Checkpoints | None, placed: Placed, batches: Batches, settings: dict[str, Any]) -> int:
    found = None if keeper is None else keeper.restore(placed.single)
    if found is None:
        return 0
    state, data, before = found
    # Settings that an older version did not store are unknown.
    names = sorted(name for name in {*before} & {*settings} if before[name] != settings[name])
    if names:
        raise UsageError(
            f"the checkpoints here were made with other settings ({', '.join(names)}); choose another directory, or "
            "give the same settings to continue"
        )
    placed.set_single(state)
    batches.set_state(data)
    return int(state.step)


def _take(
    waiting: tuple[int, dict[str, jax.Array]],
    began: float,
    report: Callable[[HostMetrics], None],
    keeper: Checkpoints | None,
) -> float:
    """Read a step's metrics, report them, and stop if the loss was not finite; returns the time."""
    step, metrics = waiting
    host = {name: float(np.asarray(jax.device_get(_local(value))).ravel()[0]) for name, value in metrics.items()}
    now = time.perf_counter()
    if not host.pop("finite"):
        last = keeper.steps if keeper is not None else []
        kept = f"the last checkpoint is of step {last[0]}" if last else "there is no checkpoint yet"
        raise UsageError(
            f"the loss or its gradient is not finite at step {step}; {kept}. Try a lower learning rate, more warm-up, "
            "or float32"
        )
    report({"step": step, **host, "seconds": now - began})
    return now


def _local(value: jax.Array) -> jax.Array:
    return value.addressable_data(0)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM, and the first SIGINT, set instead of ending the program. In the main thread only."""
    event, before = threading.Event(), {}

    def set_event(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
        event.set()

    main = threading.current_thread() is threading.main_thread()
    try:
        if main:
            before = {number: signal.signal(number, set_event) for number in (signal.SIGTERM, signal.SIGINT)}
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(stopped: threading.Event) -> bool:
    """Whether to stop after this step; the same on every process, or the others would wait forever."""
    if jax.process_count() == 1:
        return stopped.is_set()
    return bool(multihost_utils.process_allgather(np.asarray(stopped.is_set())).any())


@contextmanager
def _nothing() -> Iterator[None]:
    yield
