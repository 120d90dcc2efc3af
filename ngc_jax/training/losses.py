"""Training objectives: masked sums over tokens and their counts, without the logits of a whole batch.

A loss here is a sum and a count, because the mean over a batch that is sharded over devices or split into microbatches
is the sum of sums over the sum of counts; a mean of means differs when masks are ragged.

Legend: B batch, L tokens, c tokens of a chunk, D residual width, V vocabulary, K teacher's top-k tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import cross_entropy, divergence, in_chunks
from ngc_jax.models.attention import init_cache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layers import RESIDUALS
from ngc_jax.training.stability_loss import Pass, stability_sum
from ngc_jax.types import Params

Batch = Mapping[str, Array]
Sums = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of losses.

    Attributes:
        cross_entropy: Weight of the cross entropy with the text, in nats per token.
        divergence: Weight of KL(teacher || student) of the next-token distributions, in nats per token. At temperature
            t both distributions are those of the logits over t, and the divergence is multiplied by t^2, so that its
            gradient keeps its magnitude (Hinton et al. 2015, arXiv 1503.02531, section 2).
        temperature: t.
        top_k: Divergence over the teacher's top-k tokens and all others as one; 0 for the whole vocabulary.
        hidden: Weight of the squared distance of student's and teacher's residual streams after `hidden_layers`,
            relative to the teacher's square, averaged over the layers.
        hidden_layers: Which layers, counted from 0; negative ones from the end.
        stability: Weight of the squared distance of student's and teacher's local growth rates along depth, per layer
            and direction; see `stability_loss`.
        stability_directions: Number of perturbations that are followed.
        stability_tokens: Number of tokens of each row that are used.
        chunk: Number of tokens of a row whose logits exist at once.

    Raises:
        UsageError: If a number is out of range, or nothing has a weight.

    Example:
        >>> Objective(cross_entropy=0.5, divergence=0.5).needs_teacher
        True
    """

    cross_entropy: float = 1.0
    divergence: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    hidden: float = 0.0
    hidden_layers: tuple[int, ...] = ()
    stability: float = 0.0
    stability_directions: int = 4
    stability_tokens: int = 8
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "divergence", "hidden", "stability"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"the weight of {name} is {weight}; expected a number of at least 0")
        if not self.cross_entropy + self.divergence + self.hidden + self.stability > 0:
            raise UsageError("no loss has a weight above 0; give cross_entropy, divergence, hidden or stability one")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"temperature is {self.temperature}; expected a number above 0")
        if self.top_k < 0 or self.chunk < 1:
            raise UsageError(f"top_k is {self.top_k} and chunk {self.chunk}; expected at least 0 and at least 1")
        if self.stability_directions < 1 or self.stability_tokens < 1:
            raise UsageError(
                f"stability_directions is {self.stability_directions} and stability_tokens {self.stability_tokens}; "
                "expected at least 1 of each"
            )
        if (self.hidden > 0) != bool(self.hidden_layers):
            raise UsageError("hidden and hidden_layers belong together: give a weight and the layers, or neither")

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to run."""
        return self.divergence > 0 or self.hidden > 0 or self.stability > 0


def objective_sums(
    objective: Objective,
    decoder: Decoder,
    params: Params,
    batch: Batch,
    teacher: tuple[Decoder, Params] | None = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Array, Array, Sums]:
    """The objective summed over a batch's tokens.

    Args:
        objective: The objective.
        decoder: The student.
        params: Its parameters.
        batch: tokens, positions (-1 padding), starts (int32) and weights (float32), each (B, L); see `packing`. The
            loss of predicting a token counts with the token's weight.
        teacher: Decoder and parameters; no gradient flows into them.
        key: For the stability loss's random draws; the same for all parts of a batch. Needed with it only.

    Returns:
        The weighted sum and the count (float32 scalars), and every loss's own sum by name.

    Raises:
        UsageError: If a teacher or a key is needed and missing, or a layer does not exist.
    """
    if objective.needs_teacher and teacher is None:
        raise UsageError("this objective needs a teacher; give one")
    if objective.stability > 0 and key is None:
        raise UsageError("the stability loss draws random directions; give a key")
    weights_BxL = jnp.concatenate(
        [batch["weights"][:, 1:], jnp.zeros_like(batch["weights"][:, :1])], axis=1
    )  # of predicting the next token, at the token before it
    targets_BxL = jnp.roll(batch["tokens"], -1, axis=1)
    layers = sorted({_layer(decoder, layer) for layer in objective.hidden_layers})
    recorded = objective.stability > 0
    ours_BxLxD, ours, our_pass = _run(decoder, params, batch, layers, recorded)
    theirs_BxLxD, theirs, their_pass = ours_BxLxD, ours, our_pass
    if objective.needs_teacher:
        assert teacher is not None
        frozen = jax.lax.stop_gradient(teacher[1])
        theirs_BxLxD, theirs, their_pass = jax.lax.stop_gradient(_run(teacher[0], frozen, batch, layers, recorded))
        if teacher[0].config.vocab_size != decoder.config.vocab_size:
            raise UsageError(
                f"the teacher has {teacher[0].config.vocab_size} tokens, the student {decoder.config.vocab_size}; "
                "both must use one tokenizer"
            )

    def of_chunk(ours_BxcxD: Array, theirs_BxcxD: Array, targets_Bxc: Array) -> tuple[Array, Array]:
        ours_BxcxV = decoder.bind({"params": params}).logits(ours_BxcxD)
        entropy_Bxc = divergence_Bxc = jnp.zeros(targets_Bxc.shape)
        if objective.cross_entropy > 0:
            entropy_Bxc = cross_entropy(ours_BxcxV, targets_Bxc)
        if objective.divergence > 0:
            assert teacher is not None
            theirs_BxcxV = teacher[0].bind({"params": jax.lax.stop_gradient(teacher[1])}).logits(theirs_BxcxD)
            divergence_Bxc = divergence(
                theirs_BxcxV, ours_BxcxV, temperature=objective.temperature, top_k=objective.top_k
            )
        return entropy_Bxc, divergence_Bxc

    count = weights_BxL.sum()
    sums: Sums = {}
    if objective.cross_entropy > 0 or objective.divergence > 0:
        entropy_BxL, divergence_BxL = in_chunks(of_chunk, ours_BxLxD, theirs_BxLxD, targets_BxL, chunk=objective.chunk)
        if objective.cross_entropy > 0:
            sums["cross_entropy"] = (entropy_BxL * weights_BxL).sum()
        if objective.divergence > 0:
            sums["divergence"] = (divergence_BxL * weights_BxL).sum()
    if objective.hidden > 0:
        each = [hidden_distance(theirs[layer], ours[layer]) for layer in layers]
        sums["hidden"] = (sum(each, jnp.zeros_like(weights_BxL)) * weights_BxL).sum() / len(layers)
    if objective.stability > 0:
        assert teacher is not None
        assert key is not None
        sums["stability"] = stability_sum(
            Pass(decoder, params, *our_pass),
            Pass(teacher[0], jax.lax.stop_gradient(teacher[1]), *their_pass),
            batch,
            weights_BxL,
            key=key,
            directions=objective.stability_directions,
            tokens=objective.stability_tokens,
        )
    total = sum((getattr(objective, name) * value for name, value in sums.items()), jnp.float32(0.0))
    return total, count, sums


def hidden_distance(teacher: Float[Array, "... D"], student: Float[Array, "... D"]) -> Float[Array, ...]:
    """Squared distance over the teacher's square, for each token.

    Each token has its own scale: in trained models the first one's square is thousands of times the others' and would
    dominate the sum.

    Args:
        teacher: (..., D) residual stream.
        student: (..., D).
    """
    theirs, ours = teacher.astype(jnp.float32), student.astype(jnp.float32)
    return jnp.square(theirs - ours).sum(axis=-1) / (jnp.square(theirs).sum(axis=-1) + 1e-6)


def weight_error(weight: Float[Array, "J I"], fitted: Float[Array, "J I"]) -> Float[Array, ""]:
    """||W - What||^2 / ||W||^2: the group-local loss on weights (arXiv 2510.16851)."""
    return jnp.square(weight - fitted).sum() / jnp.square(weight).sum()


def output_error(
    weight: Float[Array, "J I"], fitted: Float[Array, "J I"], second_moment: Float[Array, "I I"]
) -> Float[Array, ""]:
    """E ||(W - What) x||^2 / E ||W x||^2: the group-local loss on block outputs, by C = E[x x^T]."""
    difference = weight - fitted
    return jnp.vdot(difference @ second_moment, difference) / jnp.vdot(weight @ second_moment, weight)


def _layer(decoder: Decoder, layer: int) -> int:
    layers = decoder.config.num_layers
    if not -layers <= layer < layers:
        raise UsageError(f"hidden_layers has {layer}, and the model {layers} layers; count from 0")
    return layer % layers


def _run(
    decoder: Decoder, params: Params, batch: Batch, layers: list[int], recorded: bool
) -> tuple[Array, dict[int, Array], tuple[Any, ...]]:
    """Final hidden states, the residual stream after some layers, and streams and cache of all if they are recorded."""
    # A cache without slots becomes the tokens in order.
    rows = batch["tokens"].shape[0]
    cache = init_cache(decoder.config, rows, 0, decoder.compute_dtype) if recorded else None
    arguments = ({"params": params}, batch["tokens"], batch["positions"], cache, batch["starts"])
    if not layers and not recorded:
        return decoder.apply(*arguments, method="hidden")[0], {}, ()
    (hidden, cache), sown = decoder.apply(*arguments, method="hidden", mutable=[RESIDUALS])
    after = [sown[RESIDUALS]["layers"][str(layer)]["output"] for layer in range(decoder.config.num_layers)]
    streams = [x for iteration in zip(*after, strict=True) for x in iteration] if recorded else []
    return hidden, {layer: after[layer][0] for layer in layers}, (streams, cache) if recorded else ()
