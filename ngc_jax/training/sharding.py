"""Placement of arrays: a mesh, and one table from a parameter's path to the mesh axes of its dimensions.

The mesh has three axes. `data` and `fsdp` both shard the batch; `fsdp` also shards parameters, which are gathered
where they are used; `tensor` shards heads and MLP neurons, so that the work within a block is distributed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ngc_jax.errors import UsageError
from ngc_jax.training.step import TrainState

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
# Mesh axis of every logical axis; None is replicated.
LOGICAL_AXES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "latent": "tensor",
    "latent_of_hidden": "fsdp",
    "experts": "tensor",
}
# Path of a parameter joined with "/", a regular expression -> logical axes. The first match applies, or the first with
# the parameter's number of dimensions: matrices of experts are stacked.
RULES: Sequence[tuple[str, tuple[str | None, ...]]] = (
    (r"(embed/embedding|unembed/kernel)$", ("vocab", "embed")),
    (r"attn/q/kernel$", ("heads", "embed")),
    (r"attn/[kv]/kernel$", ("kv", "embed")),
    (r"attn/o/kernel$", ("embed", "heads")),
    (r"mlp/[ug]/kernel$", ("mlp", "embed")),
    (r"mlp/d/kernel$", ("embed", "mlp")),
    (r"mlp/[ug]/kernel$", ("experts", None, "embed")),
    (r"mlp/d/kernel$", ("experts", "embed", None)),
    (r"mlp/router/kernel$", (None, "embed")),
    (r"attn/q/bias$", ("heads",)),
    (r"attn/[kv]/bias$", ("kv",)),
    (r"mlp/[ug]/bias$", ("mlp",)),
    (r"attn/o/bias$|mlp/d/bias$", ("embed",)),
    (r"scale$|norm/bias$", (None,)),
    # States are sharded both ways, like kernels. A signal is sharded along the latent space over `tensor` when it is
    # computed and gathered where it is read: the communication between devices has the size of the rank.
    (r"output_states/[^/]*attn\.q$", ("heads", "latent_of_hidden")),
    (r"output_states/[^/]*attn\.[kv]$", ("kv", "latent_of_hidden")),
    (r"output_states/[^/]*mlp\.[ug](\.\d+)?$", ("mlp", "latent_of_hidden")),
    (r"output_states/[^/]*(attn\.o|mlp\.d(\.\d+)?)$", ("embed", "latent")),
    (r"input_states$", ("embed", "latent")),
    (r"metric/log_diagonal$", (None,)),
    (r"metric/factor$", (None, None)),
    (r"gain$", ()),
    (r"amplitude/", (None,)),
    (r"groups/.*lift$", (None, None)),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes.

    Args:
        data: Devices along `data`; -1 for all remaining ones. Likewise for the others; only one may be -1.
        fsdp: Along `fsdp`.
        tensor: Along `tensor`.
        devices: All if None.

    Raises:
        UsageError: If the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(f"the mesh is {sizes}; expected positive sizes, at most one of them -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known == 0:
        sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"a mesh of {' x '.join(map(str, sizes))} ({', '.join(MESH_AXES)}) does not fit {len(devices)} devices"
        )
    if devices is jax.devices() or len(devices) == jax.device_count():
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """The partition spec of one parameter.

    A dimension of states is whatever rank the budget gave; it is replicated if its mesh axis does not divide it, and so
    are stacked experts. A dimension of any other parameter must be divisible.

    Args:
        path: Joined with "/".
        shape: Of the parameter.
        mesh: The mesh.

    Raises:
        UsageError: If no rule matches, the rule has another number of dimensions, or a dimension cannot be sharded.
    """
    matching = [axes for pattern, axes in RULES if re.search(pattern, path)]
    axes = next((axes for axes in matching if len(axes) == len(shape)), matching[0] if matching else None)
    if axes is None:
        raise UsageError(f"no sharding rule matches {path}; add one to RULES")
    if len(axes) != len(shape):
        raise UsageError(f"{path} has shape {tuple(shape)}, and its sharding rule {len(axes)} dimensions")
    spec: list[str | None] = []
    for size, logical in zip(shape, axes, strict=True):
        axis = None if logical is None else LOGICAL_AXES[logical]
        if axis is not None and size % mesh.shape[axis]:
            # The experts that have no group are as many as a plan left dense.
            if not path.startswith("groups/") and logical != "experts":
                raise UsageError(
                    f"{path} of shape {tuple(shape)} cannot be split: its dimension {size} is not divisible by "
                    f"{mesh.shape[axis]}, the size of mesh axis {axis!r}; choose a smaller one"
                )
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec)


def params_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of shardings like the tree of parameters (arrays or shapes).

    Raises:
        UsageError: As for `partition_spec`.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        joined = "/".join(str(key.key) for key in path)
        return NamedSharding(mesh, partition_spec(joined, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Shardings of a train state: the optimiser's moments follow their parameters, everything else is replicated.

    Args:
        state: Arrays or shapes.
        optimizer: The optimiser of its opt_state.
        mesh: The mesh.
    """
    params, everywhere = params_shardings(state.params, mesh), NamedSharding(mesh, PartitionSpec())

    def like(leaf: Any, parameter: Any, sharding: NamedSharding) -> NamedSharding:
        # Adafactor's moments have fewer dimensions than their parameters.
        return sharding if leaf.shape == parameter.shape else everywhere

    opt_state = optax.tree_utils.tree_map_params(
        optimizer, like, state.opt_state, state.params, params, transform_non_params=lambda _: everywhere
    )
    return state.replace(step=everywhere, params=params, opt_state=opt_state)


def put(tree: Any, shardings: Any) -> Any:
    """Place arrays that every process holds whole; each device receives only its own shards."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Refuse a batch that cannot be sharded over the devices of a mesh.

    Raises:
        UsageError: If they do not divide its rows.
    """
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UsageError(f"a batch of {rows} rows cannot be split over {split} devices; choose a multiple")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch from every process's own rows.

    Args:
        batch: Arrays (B / processes, L) of this process.
        mesh: The mesh.

    Raises:
        UsageError: If the devices do not divide the rows.
    """
    check_rows(next(iter(batch.values())).shape[0] * jax.process_count(), mesh)
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows_) for name, rows_ in batch.items()}


Parallel = Literal["jit", "pmap"]


def stack_for_pmap(tree: Any) -> Any:
    """A copy of every array for each local device, on a new leading axis."""
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.asarray(devices), ("devices",)), PartitionSpec("devices"))

    def one(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)[None]
        return jax.make_array_from_callback((len(devices), *host.shape[1:]), sharding, lambda _: host)

    return jax.tree.map(one, tree)


def split_for_pmap(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A process's rows (B, L) as (devices, B / devices, L).

    Raises:
        UsageError: If the devices do not divide the rows.
    """
    devices = jax.local_device_count()
    rows = next(iter(batch.values())).shape[0]
    if rows % devices:
        raise UsageError(f"{rows} rows of a process cannot be split over its {devices} devices; choose a multiple")
    return {name: x.reshape(devices, rows // devices, *x.shape[1:]) for name, x in batch.items()}
