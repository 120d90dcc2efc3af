"""Second moments of the loss's gradient with respect to every block's output, layer by layer from the top.

With C = E[x x^T] of a block's inputs and G = E[g g^T] of the gradient with respect to its outputs, an error E in its
weight raises the loss by about tr(G E C E^T) / 2 per token (K-FAC, Martens and Grosse 2015, arXiv 1503.05671, section
3). A block with more outputs than inputs needs only W^T G W, the second moment of W^T g, so that is what is summed,
unless G is requested.

Legend: K batches of a stack, B windows of a batch, L tokens, T tokens of a batch in one row, D residual width, M
outputs of a block, I its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from ngc_jax.conversion.block_gradients import add_tokens
from ngc_jax.conversion.experts import add_gradients, experts_of, gradient_means, no_gradients, row_weights
from ngc_jax.conversion.state import Calibration
from ngc_jax.conversion.statistics import InputSums, OutputGradients, add_inputs
from ngc_jax.conversion.symmetric_sums import whole, zero_bands
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.image_loss import image_loss_gradient
from ngc_jax.evaluation.likelihood import divergence_gradient, log_likelihood_gradient, sample_targets
from ngc_jax.groups.plan import Block
from ngc_jax.models.config import MLP_ROLES, DecoderConfig, block_name
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.images import Images
from ngc_jax.models.layers import INPUT_SITE, DecoderLayer
from ngc_jax.models.layerwise import (
    BATCHES_PER_CALL,
    ROWS,
    Layer,
    checked_tokens,
    each_batch,
    embed,
    layer_module,
    run_stack,
    stack_batches,
)
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params

GradientGeometry = Literal["full", "diagonal"]
Loss = Literal["text", "sampled", "teacher"]
LayerParams = Callable[[int], Params]


@dataclasses.dataclass(frozen=True)
class GradientMeasurement:
    """Which gradients are measured, and which of their statistics.

    Attributes:
        loss: Cross-entropy with the `text`, with tokens `sampled` from the model (the true Fisher information), or
            divergence from the `teacher`.
        geometry: Sum `full` second moments, or only their diagonal.
        slopes: Also sum the loss's slope along the line from the teacher's weights to those of the measured model.
        full_roles: Roles of which G itself is summed, whatever the block's shape.
        layers: Which to measure; all if None. The backward pass stops at the lowest.
    """

    loss: Loss = "text"
    geometry: GradientGeometry = "full"
    slopes: bool = False
    full_roles: str = ""
    layers: Sequence[int] | None = None


def _block_sums(block: Block, what: GradientMeasurement, full: bool) -> dict[str, Any]:
    sums: dict[str, Any] = {"mean_square": jnp.zeros(block.d_out)}
    if what.geometry == "full":
        sums["second_moment"] = zero_bands(block.d_out if full else min(block.d_out, block.d_in))
    if what.slopes:
        sums["slope"] = jnp.zeros(())
    return sums


@partial(jax.jit, static_argnames=("layer", "mesh", "full_roles"), donate_argnames=("sums", "upstream"))
def _backward(
    params: tuple[Params, Params | None],
    x: Float[Array, "K B L D"],
    positions: Int[Array, "K B L"],
    upstream: Float[Array, "K B L D"],
    sums: dict[str, dict[str, Any]],
    *,
    layer: DecoderLayer,
    mesh: Mesh | None,
    full_roles: str,
) -> tuple[Array, dict[str, dict[str, Any]]]:
    """Run a layer on a stack, backpropagate the gradient from its output to its input, and add to its blocks' sums.

    `params` has the layer's, and those with the weights W of W^T g: the dense model's, whichever model runs; None if
    that is the dense one.
    """
    config = layer.config

    def step(
        both: tuple[Params, Params | None],
        data: Mapping[str, Array],
        upstream: Array,
        sums: dict[str, dict[str, Any]],
    ) -> tuple[Array, dict[str, dict[str, Any]]]:
        params, teacher = both
        x, positions = data["x"], data["positions"]
        nothing: dict[str, Any] = {"attn": {}, "mlp": {}}
        count = experts_of(config, layer.layer)
        for role in config.roles:
            if count and config.experts is not None and role in MLP_ROLES:
                rows = x.shape[0] * x.shape[1] * config.experts.per_token
                nothing["mlp"][role] = {"output": jnp.zeros((rows, config.block(layer.layer, role, 0).d_out), x.dtype)}
                continue
            _, _, part, _ = (block := config.block(layer.layer, role)).name.split(".")
            nothing[part][role] = {"output": jnp.zeros((*x.shape[:2], block.d_out), x.dtype)}

        def run(x: Array, moved: Params) -> tuple[Array, Any]:
            return Layer(layer, params).read(x, positions, perturbations=moved)

        _, pull, inputs = jax.vjp(run, x, nothing, has_aux=True)
        downstream, gradients = pull(upstream)
        new = {}
        for name, block_sums in sums.items():
            part, role = name.split(".")
            gradient, read = gradients[part][role]["output"], inputs[INPUT_SITE[role]]
            if count and part == "mlp":
                of_rows = inputs[ROWS]
                read = read.reshape(-1, read.shape[-1])
                kernel = params[part][role]["kernel"]
                new[name] = add_gradients(
                    block_sums,
                    (kernel, kernel if teacher is None else teacher[part][role]["kernel"]),
                    read if role == "d" else read[of_rows.tokens],
                    gradient,
                    row_weights(of_rows, count, (positions >= 0).reshape(-1).astype(jnp.float32)),
                    role in full_roles,
                )
                continue
            new[name] = add_tokens(
                block_sums,
                params[part][role]["kernel"],
                None if teacher is None else teacher[part][role]["kernel"],
                read.reshape(-1, read.shape[-1]),
                gradient.reshape(-1, gradient.shape[-1]),
                role in full_roles,
            )
        return downstream, new

    return each_batch(step, params, {"x": x, "positions": positions}, upstream, sums, mesh=mesh)


@partial(jax.jit, static_argnames=("decoder", "loss"))
def _loss_gradient(
    ends: Params,
    x: Float[Array, "B L D"],
    teacher: Float[Array, "B L D"] | None,
    tokens: Int[Array, "B L"] | Images,
    positions: Int[Array, "B L"],
    key: Key[Array, ""] | None,
    *,
    decoder: Decoder,
    loss: Loss,
) -> tuple[Array, Array]:
    """The summed loss and its gradient with respect to the last layer's output."""

    def normed(x: Array) -> Array:
        y: Any = decoder.apply({"params": ends}, x, method="normed")
        return y

    if isinstance(tokens, Images):
        return image_loss_gradient(decoder, ends, x, teacher, tokens, positions, key, loss)
    if loss == "sampled":
        assert key is not None
        tokens = sample_targets(decoder, ends, normed(x), tokens, key)

    hidden, pull = jax.vjp(normed, x)
    if loss == "teacher":
        assert teacher is not None
        total, gradient = divergence_gradient(decoder, ends, hidden, normed(teacher), positions)
    else:
        likelihood, rise = log_likelihood_gradient(decoder, ends, hidden, tokens, positions)
        total, gradient = -likelihood, -rise
    return total, pull(gradient)[0]


def measure_output_gradients(
    model: LanguageModel,
    calibration: Calibration,
    what: GradientMeasurement | None = None,
    *,
    layer_params: LayerParams | None = None,
    inputs: InputSums | None = None,
    key: Key[Array, ""] | None = None,
    batches_per_call: int = BATCHES_PER_CALL,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, OutputGradients], float]:
    """Measure the gradients of the loss with respect to the outputs of the blocks of a decoder.

    A stack of batches runs forward keeping only the input of every layer, then backward one layer at a time; one
    compiled function serves all layers. Memory: the residual streams of a stack times layers, and the sums.

    Args:
        model: The dense model, the teacher.
        calibration: The tokens, and how they are run: all of the tokens, whatever its `gradient_tokens`.
        what: The loss and its statistics; those of `GradientMeasurement()` if None.
        layer_params: Dense parameters of each layer of the model measured, by number; the teacher's if None.
        inputs: Sums to which the blocks' inputs are added on the way forward, for `calibrate` to continue. Of the
            teacher only.
        key: For sampled tokens.
        batches_per_call: Batches of a stack.
        progress: Called with (batches done, total).

    Returns:
        By block name, and the mean loss per token in nats.

    Raises:
        UsageError: If there are fewer than two tokens, or gradients are not finite.
    """
    what = what or GradientMeasurement()
    config, params, mesh = model.config, model.params, calibration.mesh
    decoder = model.decoder.clone(dtype=None)
    tokens = checked_tokens(calibration.tokens, config)
    if len(tokens) < 2:
        raise UsageError("there are too few tokens to take gradients on; give a longer text")
    if what.loss == "sampled" and key is None:
        raise ValueError("sampled tokens need a key")
    if inputs is not None and layer_params is not None:
        raise ValueError("only the teacher's inputs can be added up")
    ends = {name: value for name, value in params.items() if name != "layers"}
    teacher_layers: LayerParams = lambda layer: params["layers"][str(layer)]  # noqa: E731
    ours = layer_params or teacher_layers
    modules = [layer_module(decoder, layer) for layer in range(config.num_layers)]
    chosen = sorted(range(config.num_layers) if what.layers is None else what.layers)
    sums = {layer: _layer_sums(config, layer, what) for layer in chosen}
    stacks = stack_batches(tokens, calibration.window, calibration.batch_size, batches_per_call, mesh)
    done, in_all = 0, sum(stack.used() for stack in stacks)
    total = 0.0
    for stack in stacks:
        kept = [embed(decoder, params, stack.tokens)]
        teacher = kept[0]
        for layer, module in enumerate(modules):
            if inputs is None:
                kept.append(run_stack(ours(layer), kept[-1], stack.positions, layer=module, mesh=mesh))
            else:
                y, inputs.layers[layer] = add_inputs(
                    ours(layer), kept[-1], stack, inputs.layers[layer], layer=module, mesh=mesh
                )
                kept.append(y)
            if what.loss == "teacher":
                teacher = run_stack(teacher_layers(layer), teacher, stack.positions, layer=module, mesh=mesh)
        upstream = jnp.zeros_like(last := kept.pop())
        for k in range(stack.used()):
            if key is not None:
                key, batch_key = jax.random.split(key)
            value, gradient = _loss_gradient(
                ends,
                last[k],
                teacher[k] if what.loss == "teacher" else None,
                jax.tree.map(lambda leaf, k=k: leaf[k], stack.tokens),
                stack.positions[k],
                batch_key if what.loss == "sampled" else None,
                decoder=decoder,
                loss=what.loss,
            )
            upstream = upstream.at[k].set(gradient)
            total += float(value)
        for layer in range(config.num_layers - 1, chosen[0] - 1, -1):
            upstream, new = _backward(
                (ours(layer), None if layer_params is None else teacher_layers(layer)),
                kept.pop(),
                stack.positions,
                upstream,
                sums.get(layer, {}),
                layer=modules[layer],
                mesh=mesh,
                full_roles=what.full_roles,
            )
            if layer in sums:
                sums[layer] = new
        if inputs is not None:
            inputs.count += int((stack.positions >= 0).sum())
        done += stack.used()
        if progress is not None:
            jax.block_until_ready(upstream)
            progress(done, in_all)
    if not np.isfinite(total):
        raise UsageError("the loss on the calibration text is not finite; load the model with --dtype float32")
    found: dict[str, OutputGradients] = {}
    for layer in chosen:
        found |= _means(config, layer, sums.pop(layer), len(tokens))
    return found, total / len(tokens)


def _layer_sums(config: DecoderConfig, layer: int, what: GradientMeasurement) -> dict[str, dict[str, Any]]:
    """Empty sums of a layer's blocks, by part and role."""
    found: dict[str, dict[str, Any]] = {}
    count = experts_of(config, layer)
    for role in config.roles:
        full = role in what.full_roles
        if count and role in MLP_ROLES:
            block, second = config.block(layer, role, 0), what.geometry == "full"
            found[f"mlp.{role}"] = no_gradients(count, block, full=full, second=second, slopes=what.slopes)
        else:
            block = config.block(layer, role)
            found[_short(block.name)] = _block_sums(block, what, full)
    return found


def _short(block: str) -> str:
    """A block's name within its layer."""
    return ".".join(block.split(".")[2:])


def _means(
    config: DecoderConfig, layer: int, sums: dict[str, dict[str, Any]], count: int
) -> dict[str, OutputGradients]:
    """The statistics of a layer's blocks by name, from sums that are freed one by one."""
    found: dict[str, OutputGradients] = {}
    for role in config.roles:
        if experts_of(config, layer) and role in MLP_ROLES:
            found |= _means_of_experts(config, layer, role, sums.pop(f"mlp.{role}"), count)
            continue
        name = block_name(layer, role)
        mean: dict[str, Any] = {
            kind: (whole(map(np.asarray, value)) if kind == "second_moment" else np.asarray(value, np.float64)) / count
            for kind, value in sums.pop(_short(name)).items()
        }
        if not all(np.isfinite(value).all() for value in mean.values()):
            raise UsageError(f"the gradients of {name} are not finite; load the model with --dtype float32")
        if "slope" in mean:
            mean["slope"] = float(mean["slope"])
        found[name] = OutputGradients(count, **mean)
    return found


def _means_of_experts(
    config: DecoderConfig, layer: int, role: str, sums: Mapping[str, Any], count: int
) -> dict[str, OutputGradients]:
    """As `_means`, of one role of all experts."""
    found: dict[str, OutputGradients] = {}
    means = gradient_means(sums, config.block(layer, role, 0), count, hidden=role != "d")
    for expert, fields in enumerate(means):
        name = block_name(layer, role, expert)
        if not all(np.isfinite(value).all() for value in fields.values() if value is not None):
            raise UsageError(f"the gradients of {name} are not finite; load the model with --dtype float32")
        found[name] = OutputGradients(count, **fields)
    return found
