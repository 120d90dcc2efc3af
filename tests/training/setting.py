"""A tiny distillation that tests of the loop share, in this process or another."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.training import fit, loop
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.step import Constants, Program, jit_step
from ngc_jax.training.trainable import split_params
from tests.models.compact import dense_model
from tests.tiny import random_tokens

ROWS, LENGTH = 8, 12


class CountedBatches:
    """Batches made from their number: the plainest thing with a position. Rows are ragged."""

    def __init__(self, process: int = 0, processes: int = 1) -> None:
        self.next, self.process, self.processes = 0, process, processes

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.next)
        self.next += 1
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
        positions[positions >= rng.integers(1, LENGTH + 1, ROWS)[:, None]] = -1
        batch = {
            "tokens": rng.integers(0, 256, (ROWS, LENGTH)).astype(np.int32),
            "positions": positions,
            "starts": np.zeros((ROWS, LENGTH), np.int32),
            "weights": (positions > 0).astype(np.float32),
        }
        rows = slice(self.process * ROWS // self.processes, (self.process + 1) * ROWS // self.processes)
        return {name: value[rows] for name, value in batch.items()}

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def distillation(learning_rate: float = 1e-2) -> tuple[Program, dict, Constants]:
    teacher = dense_model("llama", num_hidden_layers=1)
    student = convert(teacher, Recipe("svd", keep=0.7, gauge=True), random_tokens(64))
    trained, frozen = split_params(student.params, "states_and_norms")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate, steps=20, warmup_steps=2))
    program = Program(student.decoder, Objective(0.5, 1.0, chunk=8), optimizer, teacher.decoder)
    return program, trained, Constants(frozen, jax.tree.map(lambda x: x, teacher.params))


@contextmanager
def each_step_compiled_once() -> Iterator[None]:
    """Training runs of the same settings share the compiled step, which would be the same program."""
    optimizers, steps = {}, {}

    def optimizer(config):
        return optimizers.setdefault(repr(config), make_optimizer(config))

    def step(program, *, state_shardings, replicated):
        key = program, replicated, jax.tree.structure(state_shardings), tuple(jax.tree.leaves(state_shardings))
        if key not in steps:
            steps[key] = jit_step(program, state_shardings=state_shardings, replicated=replicated)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "make_optimizer", optimizer)
        patch.setattr(loop, "jit_step", step)
        yield
