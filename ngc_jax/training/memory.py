"""Bytes on every device of a mesh, computed from shapes alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.latent_cache import bytes_per_token
from ngc_jax.training import sharding
from ngc_jax.training.fit import TrainConfig
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.step import Constants, Program, TrainState, init_state, jit_step
from ngc_jax.training.trainable import cast_matrices, split_params


def plan_memory(
    config: DecoderConfig,
    plan: Plan | None,
    training: TrainConfig,
    *,
    mesh_shape: tuple[int, int, int] = (1, 1, 1),
    teacher: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Memory per device of the student's state, the teacher and the activations kept between layers.

    Args:
        config: The dense architecture.
        plan: Of the student; None for a dense one.
        training: Of its fields, batch size, sequence length, trainable, optimiser and type of the computation count.
            Activations are recomputed.
        mesh_shape: Devices along data, fsdp and tensor.
        teacher: Whether the dense model itself is the teacher, in addition to the student.
        compile: Also compile the step, on the mesh's number of devices of this machine, for the compiler's own
            account of temporaries.

    Returns:
        bytes_per_device by part, parameters, trained, devices, cache_bytes_per_token of the student by kind of cache,
        and replicated_share: bytes of the student's parameters that are not sharded, over all its bytes; with `compile`
        also compiled_bytes_per_device.

    Raises:
        UsageError: If the plan does not fit the model, or the mesh cannot shard it.
    """
    computed = training.compute_dtype
    decoder = Decoder(config, plan, remat=True, dtype=computed)
    shapes = _shapes(decoder)
    trained, frozen = split_params(shapes, training.trainable)
    dense = Decoder(config, None, computed) if teacher else None
    objective = Objective(cross_entropy=0.0, divergence=1.0) if teacher else Objective()
    program = Program(decoder, objective, make_optimizer(training.optimizer or OptimizerConfig()), dense)
    state = jax.eval_shape(lambda p: init_state(program, p), trained)
    frozen = jax.eval_shape(lambda p: cast_matrices(p, computed), frozen)
    constants = Constants(frozen, None if dense is None else _shapes(dense))

    mesh: Any = AbstractMesh(mesh_shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state_at = sharding.state_shardings(state, program.optimizer, mesh)
    constants_at = Constants(
        *(
            None if part is None else sharding.params_shardings(part, mesh)
            for part in (constants.frozen, constants.teacher)
        )
    )
    rows = math.ceil(training.batch_size / (mesh_shape[0] * mesh_shape[1]))
    activations = rows * training.sequence_length * config.embed_dim * config.num_layers * computed.itemsize
    student_bytes = _bytes(shapes, sharding.params_shardings(shapes, mesh))
    parts = {
        "trained parameters, float32": _bytes(state.params, state_at.params),
        "optimiser": _bytes(state.opt_state, state_at.opt_state),
        "gradients, float32": _bytes(state.params, state_at.params),
        f"trained parameters in {computed.name}": _bytes(state.params, state_at.params) * computed.itemsize // 4,
        "frozen parameters": _bytes(constants.frozen, constants_at.frozen),
        "residual stream of all layers": activations,
    }
    if teacher:
        parts["teacher"] = _bytes(constants.teacher, constants_at.teacher)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    devices = math.prod(mesh_shape)
    found = {
        "bytes_per_device": {**parts, "sum": sum(parts.values())},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "devices": devices,
        "cache_bytes_per_token": bytes_per_token(config, plan, dtype),
        # x = split + alike on each device; the whole is at best devices * split, plus alike once.
        "replicated_share": max((student_bytes * devices - whole) / (devices - 1) / whole, 0.0) if devices > 1 else 1.0,
    }
    if compile:
        mesh, shape = sharding.make_mesh(*mesh_shape), (training.batch_size, training.sequence_length)
        found["compiled_bytes_per_device"] = _compile(program, state, constants, mesh, shape)
    return found


def _compile(
    program: Program, state: TrainState, constants: Constants, mesh: Mesh, shape: tuple[int, int]
) -> dict[str, int]:
    """The compiler's account of a step on a batch of this shape, over devices of this machine."""
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
    """Bytes on each device."""
    each = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(each))
