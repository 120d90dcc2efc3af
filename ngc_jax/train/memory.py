"""Bytes on every device of a mesh, from shapes alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.train import sharding
from ngc_jax.train.fresh import uniform_plan
from ngc_jax.train.losses import Objective
from ngc_jax.train.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.train.step import Constants, Program, TrainState, init_state, jit_step
from ngc_jax.train.trainable import cast_params, split_params

if TYPE_CHECKING:
    from ngc_jax.commands.plan_memory import PlanMemoryConfig


def plan_memory(config: DecoderConfig, options: PlanMemoryConfig) -> dict[str, Any]:
    """What the student's state, the teacher and the activations kept between layers take on a device.

    Args:
        config: The dense architecture.
        options: As of `ngc-jax plan-memory`.

    Returns:
        bytes_per_device by part, parameters, trained, devices, and replicated_share: bytes of the student's parameters
        that no mesh axis splits, over all its bytes.

    Raises:
        UsageError: If the plan does not fit the model, or the mesh cannot split it.
    """
    dtype = jnp.dtype(options.compute_dtype)
    plan = None
    if options.topology is not None:
        plan = uniform_plan(config, options.topology, keep=options.keep, multiple=options.rank_multiple)
    decoder = Decoder(config, plan, dtype, remat=True)
    shapes = _shapes(decoder)
    trained, frozen = split_params(shapes, options.trainable)
    teacher = Decoder(config, None, dtype) if options.teacher else None
    objective = Objective(cross_entropy=0.0, divergence=1.0) if teacher else Objective()
    program = Program(decoder, objective, make_optimizer(OptimizerConfig(options.optimizer)), teacher)
    state = jax.eval_shape(lambda p: init_state(program, p), trained)
    frozen = jax.eval_shape(lambda p: cast_params(p, dtype), frozen)
    constants = Constants(frozen, None if teacher is None else _shapes(teacher))

    sizes = (options.data, options.fsdp, options.tensor)
    mesh: Any = AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state_at = sharding.state_shardings(state, program.optimizer, mesh)
    constants_at = Constants(
        *(
            None if part is None else sharding.params_shardings(part, mesh)
            for part in (constants.frozen, constants.teacher)
        )
    )
    rows = math.ceil(options.batch_size / (options.data * options.fsdp))
    student_bytes = _bytes(shapes, sharding.params_shardings(shapes, mesh))
    parts = {
        "trained parameters, float32": _bytes(state.params, state_at.params),
        "optimiser": _bytes(state.opt_state, state_at.opt_state),
        "gradients, float32": _bytes(state.params, state_at.params),
        f"trained parameters in {dtype.name}": _bytes(state.params, state_at.params) * dtype.itemsize // 4,
        "frozen parameters": _bytes(constants.frozen, constants_at.frozen),
        "residual stream of all layers": rows
        * options.sequence_length
        * config.embed_dim
        * config.num_layers
        * dtype.itemsize,
    }
    if teacher is not None:
        parts["teacher"] = _bytes(constants.teacher, constants_at.teacher)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    devices = math.prod(sizes)
    found = {
        "bytes_per_device": {**parts, "sum": sum(parts.values())},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "devices": devices,
        # x = split + alike on each device, whole = devices-fold split at best + alike once.
        "replicated_share": max((student_bytes * devices - whole) / (devices - 1) / whole, 0.0) if devices > 1 else 1.0,
    }
    if options.compile:
        found["compiled_bytes_per_device"] = _compile(program, state, constants, options)
    return found


def _compile(program: Program, state: TrainState, constants: Constants, options: PlanMemoryConfig) -> dict[str, int]:
    """The compiler's account of a step, over devices of this machine."""
    mesh = sharding.make_mesh(options.data, options.fsdp, options.tensor)
    state_at = sharding.state_shardings(state, program.optimizer, mesh)

    def at(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)

    placed = Constants(
        *(
            None if part is None else at(part, sharding.params_shardings(part, mesh))
            for part in (constants.frozen, constants.teacher)
        )
    )
    rows = NamedSharding(mesh, sharding.BATCH)
    shape = (options.batch_size, options.sequence_length)
    kinds = {"tokens": jnp.int32, "positions": jnp.int32, "starts": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in kinds.items()}
    everywhere = NamedSharding(mesh, jax.sharding.PartitionSpec())
    step: Any = jit_step(program, state_shardings=state_at, replicated=everywhere)
    memory = step.lower(at(state, state_at), placed, batch).compile().memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def _shapes(decoder: Decoder) -> Any:
    return jax.eval_shape(decoder.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


def _bytes(tree: Any, shardings: Any) -> int:
    """On each device."""
    each = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(each))
