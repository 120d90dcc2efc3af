"""Train a converted model's blocks briefly: its dense model's next-token distributions, on the calibration text.

The closed forms of a conversion minimise the quadratic loss of each block, or of each layer. What is left are errors
that only the layers together can correct. A few steps on the loss itself correct part of them: Adam on

    KL(dense || converted),    mean over the tokens of a step,

(Hinton et al. 2015, arXiv 1503.02531), every token seen once. It is distillation with the text that the conversion has
already, in few, small steps, because each start is close to its end. The embeddings stay as they are.

Legend: B windows of a step, L tokens of a window.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from ngc_jax.conversion.state import Calibration, ConversionState
from ngc_jax.errors import UsageError
from ngc_jax.models.load import LanguageModel
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.step import Constants, Program, init_state, jit_step
from ngc_jax.training.trainable import merge_params
from ngc_jax.types import Params

# Tokens of a step, at least, on each device. Fewer steps of more tokens reached less on SmolLM2.
_STEP = 512
_OBJECTIVE = Objective(cross_entropy=0.0, divergence=1.0)


def refined(state: ConversionState, tokens: int, rate: float) -> LanguageModel:
    """The compact model of a conversion, trained on the last tokens of the calibration text.

    Args:
        state: With a compact model, and the weights of the dense one.
        tokens: Number of tokens; all if the text has fewer.
        rate: Adam's learning rate in the first step.

    Raises:
        UsageError: If the text is shorter than two tokens, or the loss is not finite.
    """
    compact, calibration = state.compact, state.calibration
    dense = state.dense if state.original is None else state.original
    assert compact is not None
    batches = step_windows(calibration, tokens)
    trained, frozen = _split(compact.params)
    optimizer = OptimizerConfig("adam", rate, steps=len(batches), warmup_steps=min(2, len(batches) - 1))
    student = compact.decoder.clone(param_dtype=jnp.dtype("float32"), dtype=compact.decoder.compute_dtype)
    program = Program(student, _OBJECTIVE, make_optimizer(optimizer), dense.decoder)
    constants, step = Constants(frozen, dense.params), jit_step(program)
    training = init_state(program, trained)
    if calibration.mesh is not None:
        everywhere = NamedSharding(calibration.mesh, PartitionSpec())
        training, constants = jax.device_put((training, constants), everywhere)
    for done, tokens_BxL in enumerate(batches, start=1):
        training, metrics = step(training, constants, _batch(tokens_BxL, calibration))
        if not math.isfinite(metrics["loss"]):
            raise UsageError(
                "the converted model's loss is not finite; load the model with --dtype float32, or lower refine-rate"
            )
        state.report("refine", done, len(batches))
    return dataclasses.replace(compact, params=merge_params(_like(compact.params, training.params), frozen))


def step_windows(calibration: Calibration, tokens: int) -> list[Int[np.ndarray, "B L"]]:
    """The windows of each step, in a fixed random order, so that a step has different parts of the text.

    Args:
        calibration: The text and its windows.
        tokens: Number of tokens, from the end, rounded down to whole steps; at least one step. All if the text has
            fewer.

    Raises:
        UsageError: If the text is shorter than two tokens, or has fewer windows than there are devices.

    Example:
        >>> text = Calibration(np.arange(10_000), window=1000)
        >>> steps = step_windows(text, 3500)
        >>> len(steps), steps[0].shape
        (3, (1, 1000))
    """
    length = min(calibration.window, len(calibration.tokens))
    if length < 2:
        raise UsageError(f"refining needs a calibration text of at least 2 tokens, not {length}; give a longer text")
    devices = 1 if calibration.mesh is None else calibration.mesh.shape["data"]
    windows = calibration.tokens[: len(calibration.tokens) // length * length].reshape(-1, length)
    rows = max(_STEP // length, 1) * devices
    rows = min(rows, len(windows) // devices * devices)
    if not rows:
        raise UsageError(f"{len(windows)} windows of calibration text do not reach {devices} devices; give more text")
    steps = max(min(tokens, windows.size) // (rows * length), 1)
    chosen = windows[len(windows) - steps * rows :]
    order = np.random.default_rng(0).permutation(len(chosen))
    return list(chosen[order].reshape(steps, rows, length))


def _batch(tokens_BxL: np.ndarray, calibration: Calibration) -> dict[str, jax.Array]:
    shape = tokens_BxL.shape
    batch = {
        "tokens": tokens_BxL.astype(np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "starts": np.zeros(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    if calibration.mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    return jax.device_put(batch, NamedSharding(calibration.mesh, PartitionSpec("data")))


def _split(params: Params) -> tuple[Params, Params]:
    """The parameters of groups and layers, which train, and the others."""
    flat = traverse_util.flatten_dict(dict(params))
    trained = {path: leaf for path, leaf in flat.items() if path[0] in ("groups", "layers")}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def _like(before: Params, after: Params) -> Params:
    """The trained parameters in the types of the untrained ones."""
    types = traverse_util.flatten_dict(dict(before))
    flat = traverse_util.flatten_dict(dict(after))
    return traverse_util.unflatten_dict({path: leaf.astype(types[path].dtype) for path, leaf in flat.items()})
