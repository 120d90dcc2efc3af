"""Training checkpoints: state, data position and settings, by orbax.

A checkpoint is written beside the others in the background, while training continues, and is renamed when it is
complete. A damaged checkpoint is moved aside at restore and the previous one is used; the damaged step is then written
again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ngc_jax.errors import UsageError
from ngc_jax.files import os_errors
from ngc_jax.training.step import TrainState

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written."""

    def __init__(self, directory: str | Path, *, keep: int = 3, keep_period: int | None = None) -> None:
        """Open or create a directory of checkpoints.

        Args:
            directory: Where they are.
            keep: Number of the newest ones to keep.
            keep_period: Checkpoints at multiples of this step are kept too.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("state", "data", "settings")
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with os_errors(self._directory):
                self._manager.wait_until_finished()
                self._manager.close()
        except OSError:
            if error is None:  # else the first error is more informative
                raise
        if error is not None:
            with suppress(OSError):  # a run that failed before its first step leaves nothing
                self._directory.rmdir()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: TrainState, data: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of the state's step. Does nothing if there already is one.

        Args:
            state: Copied before this returns, so that it may be donated.
            data: Position of the data, JSON; the same on every process.
            settings: The run's settings, JSON; the same on every process.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with os_errors(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    settings=ocp.args.JsonSave(dict(settings)),
                ),
                force=True,
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]] | None:
        """The newest complete checkpoint, on the mesh that `like` specifies.

        Args:
            like: Shapes, types and shardings of the state; arrays or jax.ShapeDtypeStruct.

        Returns:
            State, data position and settings; None if there is no checkpoint.

        Raises:
            UsageError: If there are checkpoints but none can be read as such a state.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        reasons: dict[int, str] = {}
        for step in self.steps:
            try:
                self._check_shapes(step, abstract)
                found = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract),
                        data=ocp.args.JsonRestore(),
                        settings=ocp.args.JsonRestore(),
                    ),
                )
                if not isinstance(found["settings"], Mapping) or not (
                    isinstance(found["data"], Mapping) and found["data"]
                ):
                    raise ValueError("its settings or its position in the data are damaged")
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                reasons[step] = reason
                _log.warning(
                    "checkpoint %s of %s cannot be read (%s); trying the previous one", step, self._directory, reason
                )
                continue
            self._move_aside(list(reasons))
            return found["state"], dict(found["data"]), dict(found["settings"])
        if reasons:
            failures = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
            raise UsageError(
                f"no checkpoint in {self._directory} can be read ({failures}); was the run made with another "
                "model or other settings? Choose another --out, or remove the directory"
            )
        return None

    def _check_shapes(self, step: int, abstract: Any) -> None:
        """Raises ValueError if an array has an unexpected shape.

        Orbax would notice only while it reads, and leave the reads of other arrays unfinished.
        """
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata(self._directory / str(step) / "state").item_metadata
        if saved is None:
            raise ValueError("its arrays are missing or damaged")
        shapes = _shapes(saved.tree)
        for name, wanted in _shapes(abstract).items():
            if shapes.get(name, wanted) != wanted:
                raise ValueError(f"{name} has shape {shapes[name]}, expected {wanted}")

    def _move_aside(self, steps: list[int]) -> None:
        """Rename unreadable checkpoints: their steps are written again, and nothing is lost."""
        for step in steps:
            if jax.process_index() == 0:
                number = 0
                while (aside := self._directory / f"unreadable-{step}-{number}").exists():
                    number += 1
                (self._directory / str(step)).rename(aside)
                _log.warning("checkpoint %s is kept as %s", step, aside)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("unreadable checkpoints moved aside")
            self._manager.reload()

    def wait(self) -> None:
        """Wait until all started writes are done."""
        with os_errors(self._directory):
            self._manager.wait_until_finished()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
