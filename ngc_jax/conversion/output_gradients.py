"""Second moments of the loss's gradient with respect to every block's output, layer by layer from the top.

With C = E[x x^T] of a block's inputs and G = E[g g^T] of the gradient with respect to its outputs, an error E in its
weight raises the loss by about tr(G E C E^T) / 2 per token (K-FAC, Martens and Grosse 2015, arXiv 1503.05671, section
3). A block with more outputs than inputs needs only W^T G W, the second moment of W^T g, so that is what is summed,
unless G is requested.

Legend: K batches of a stack, B windows of a batch, L tokens, T tokens of a batch in one row, D residual width, M
outputs of a block, I its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from ngc_jax.conversion.layerwise import BATCHES_PER_CALL, each_batch, stack_batches
from ngc_jax.conversion.statistics import InputSums, OutputGradients, layer_kind, read_layer, run_layer, sown_input
from ngc_jax.conversion.symmetric_sums import gram, whole, zero_bands
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import divergence_gradient, log_likelihood_gradient, sample_targets
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import ROLES, DecoderConfig, block_name
from ngc_jax.models.decoder import BLOCK_INPUTS, Decoder, DecoderLayer
from ngc_jax.tokens import as_tokens
from ngc_jax.types import Params

GradientGeometry = Literal["full", "diagonal"]
Loss = Literal["text", "sampled", "teacher"]
LayerParams = Callable[[int], Params]


def _block_sums(d_out: int, d_in: int, geometry: GradientGeometry, slopes: bool, full: bool) -> dict[str, Any]:
    sums: dict[str, Any] = {"mean_square": jnp.zeros(d_out)}
    if geometry == "full":
        sums["second_moment"] = zero_bands(d_out if full else min(d_out, d_in))
    if slopes:
        sums["slope"] = jnp.zeros(())
    return sums


def _add(
    sums: dict[str, Any], kernel_MxI: Array, teacher_MxI: Array | None, x_TxI: Array, g_TxM: Array, full: bool
) -> dict[str, Any]:
    """Add the tokens of a batch to a block's sums; padded tokens have no gradient.

    With None for the teacher's kernel, where it is the block's own, XLA computes W^T g in the backward pass.
    """
    teacher_MxI = kernel_MxI if teacher_MxI is None else teacher_MxI
    x_TxI, g_TxM = x_TxI.astype(jnp.float32), g_TxM.astype(jnp.float32)
    new: dict[str, Any] = {"mean_square": sums["mean_square"] + jnp.square(g_TxM).sum(axis=0)}
    kernel_MxI, teacher_MxI = kernel_MxI.astype(jnp.float32), teacher_MxI.astype(jnp.float32)
    if "second_moment" in sums:
        d_out, d_in = teacher_MxI.shape
        products = gram(g_TxM if full or d_out <= d_in else g_TxM @ teacher_MxI)
        new["second_moment"] = jax.tree.map(jnp.add, sums["second_moment"], products)
    if "slope" in sums:
        # The difference of the weights, not of two products, which may have low precision.
        new["slope"] = sums["slope"] + jnp.vdot(g_TxM, x_TxI @ (kernel_MxI - teacher_MxI).T)
    return new


@partial(jax.jit, static_argnames=("config", "kind", "mesh", "full_roles"), donate_argnames=("sums", "upstream"))
def _backward(
    params: Params,
    teacher: Params | None,
    x: Float[Array, "K B L D"],
    positions: Int[Array, "K B L"],
    upstream: Float[Array, "K B L D"],
    sums: dict[str, dict[str, Any]],
    *,
    config: DecoderConfig,
    kind: int,
    mesh: Mesh | None,
    full_roles: str,
) -> tuple[Array, dict[str, dict[str, Any]]]:
    """Run a layer on a stack, backpropagate the gradient from its output to its input, and add to its blocks' sums.

    `teacher` has the weights W of W^T g: those of the dense model, whichever model runs; None if that is the dense one.
    """
    layer = DecoderLayer(config, Plan(), kind, x.dtype)

    def step(
        both: tuple[Params, Params | None],
        data: Mapping[str, Array],
        upstream: Array,
        sums: dict[str, dict[str, Any]],
    ) -> tuple[Array, dict[str, dict[str, Any]]]:
        params, teacher = both
        x, positions = data["x"], data["positions"]
        nothing: dict[str, Any] = {"attn": {}, "mlp": {}}
        for role in ROLES:
            _, _, part, _ = (block := config.block(kind, role)).name.split(".")
            nothing[part][role] = {"output": jnp.zeros((*x.shape[:2], block.d_out), x.dtype)}

        def run(x: Array, moved: Params) -> tuple[Array, Any]:
            variables = {"params": params, "perturbations": moved}
            (y, _), sown = layer.apply(variables, x, positions, mutable=[BLOCK_INPUTS])
            return y, sown[BLOCK_INPUTS]

        _, pull, sown = jax.vjp(run, x, nothing, has_aux=True)
        downstream, gradients = pull(upstream)
        new = {}
        for name, block_sums in sums.items():
            part, role = name.split(".")
            gradient = gradients[part][role]["output"]
            read = sown_input(sown, role)
            new[name] = _add(
                block_sums,
                params[part][role]["kernel"],
                None if teacher is None else teacher[part][role]["kernel"],
                read.reshape(-1, read.shape[-1]),
                gradient.reshape(-1, gradient.shape[-1]),
                role in full_roles,
            )
        return downstream, new

    return each_batch(step, (params, teacher), {"x": x, "positions": positions}, upstream, sums, mesh=mesh)


@partial(jax.jit, static_argnames=("decoder", "loss"))
def _loss_gradient(
    ends: Params,
    x: Float[Array, "B L D"],
    teacher: Float[Array, "B L D"] | None,
    tokens: Int[Array, "B L"],
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
    config: DecoderConfig,
    params: Params,
    tokens: np.ndarray,
    *,
    layer_params: LayerParams | None = None,
    loss: Loss = "text",
    geometry: GradientGeometry = "full",
    slopes: bool = False,
    full_roles: str = "",
    layers: Sequence[int] | None = None,
    inputs: InputSums | None = None,
    key: Key[Array, ""] | None = None,
    window: int = 1024,
    batch_size: int = 2,
    batches_per_call: int = BATCHES_PER_CALL,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, OutputGradients], float]:
    """Measure the gradients of the loss with respect to the outputs of the blocks of a decoder.

    A stack of batches runs forward keeping only the input of every layer, then backward one layer at a time; one
    compiled function serves all layers. Memory: the residual streams of a stack times layers, and the sums.

    Args:
        config: The architecture.
        params: Dense parameters of the teacher.
        tokens: (T,), one stream of token ids; cut into windows.
        layer_params: Dense parameters of each layer of the model measured, by number; the teacher's if None.
        loss: Cross-entropy with the `text`, with tokens `sampled` from the model (the true Fisher information), or
            divergence from the `teacher`.
        geometry: Sum `full` second moments, or only their diagonal.
        slopes: Also sum the loss's slope along the line from the teacher's weights to those of the measured model.
        full_roles: Roles of which G itself is summed, whatever the block's shape.
        layers: Which to measure; all if None. The backward pass stops at the lowest.
        inputs: Sums to which the blocks' inputs are added on the way forward, for `calibrate` to continue. Of the
            teacher only.
        key: For sampled tokens.
        window: Tokens in a window.
        batch_size: Windows that run at once, on each device.
        batches_per_call: Batches of a stack.
        mesh: The windows of a batch are sharded over its axis "data"; None for one device.
        progress: Called with (batches done, total).

    Returns:
        By block name, and the mean loss per token in nats.

    Raises:
        UsageError: If there are fewer than two tokens, or gradients are not finite.
    """
    tokens = as_tokens(tokens, config.vocab_size, least=0)
    if len(tokens) < 2:
        raise UsageError("there are too few tokens to take gradients on; give a longer text")
    if loss == "sampled" and key is None:
        raise ValueError("sampled tokens need a key")
    if inputs is not None and layer_params is not None:
        raise ValueError("only the teacher's inputs can be added up")
    dtype = jax.tree.leaves(params["layers"])[0].dtype
    decoder = Decoder(config, None, dtype)
    ends = {name: value for name, value in params.items() if name != "layers"}
    embed = jax.jit(lambda p, t: decoder.apply({"params": p}, t, method="embedded"))
    teacher_layers: LayerParams = lambda layer: params["layers"][str(layer)]  # noqa: E731
    ours = layer_params or teacher_layers
    chosen = sorted(range(config.num_layers) if layers is None else layers)
    sums = {
        layer: {
            ".".join(block.name.split(".")[2:]): _block_sums(
                block.d_out, block.d_in, geometry, slopes, role in full_roles
            )
            for role, block in ((role, config.block(layer, role)) for role in ROLES)
        }
        for layer in chosen
    }
    stacks = stack_batches(tokens, window, batch_size, batches_per_call, mesh)
    done, in_all = 0, sum(stack.used() for stack in stacks)
    total = 0.0
    for stack in stacks:
        batch, positions, mask = stack
        kept = [embed({"embed": params["embed"]}, batch)]
        teacher = kept[0]
        for layer in range(config.num_layers):
            kind = layer_kind(config, layer)
            if inputs is None:
                kept.append(run_layer(ours(layer), kept[-1], positions, config=config, kind=kind, mesh=mesh))
            else:
                y, inputs.layers[layer] = read_layer(
                    ours(layer), kept[-1], positions, mask, inputs.layers[layer], config=config, kind=kind, mesh=mesh
                )
                kept.append(y)
            if loss == "teacher":
                teacher = run_layer(teacher_layers(layer), teacher, positions, config=config, kind=kind, mesh=mesh)
        upstream = jnp.zeros_like(last := kept.pop())
        for k in range(stack.used()):
            if key is not None:
                key, batch_key = jax.random.split(key)
            value, gradient = _loss_gradient(
                ends,
                last[k],
                teacher[k] if loss == "teacher" else None,
                batch[k],
                positions[k],
                batch_key if loss == "sampled" else None,
                decoder=decoder,
                loss=loss,
            )
            upstream = upstream.at[k].set(gradient)
            total += float(value)
        for layer in range(config.num_layers - 1, chosen[0] - 1, -1):
            kind = layer_kind(config, layer)
            upstream, new = _backward(
                ours(layer),
                None if layer_params is None else teacher_layers(layer),
                kept.pop(),
                positions,
                upstream,
                sums.get(layer, {}),
                config=config,
                kind=kind,
                mesh=mesh,
                full_roles=full_roles,
            )
            if layer in sums:
                sums[layer] = new
        if inputs is not None:
            inputs.count += int((positions >= 0).sum())
        done += stack.used()
        if progress is not None:
            jax.block_until_ready(upstream)
            progress(done, in_all)
    if not np.isfinite(total):
        raise UsageError("the loss on the calibration text is not finite; load the model with --dtype float32")
    found = {}
    for layer in chosen:
        for role in ROLES:
            block = config.block(layer, role)
            mean: dict[str, Any] = {
                name: (whole(map(np.asarray, value)) if name == "second_moment" else np.asarray(value, np.float64))
                / len(tokens)
                for name, value in sums[layer].pop(".".join(block.name.split(".")[2:])).items()
            }
            if not all(np.isfinite(value).all() for value in mean.values()):
                raise UsageError(f"the gradients of {block.name} are not finite; load the model with --dtype float32")
            if slopes:
                mean["slope"] = float(mean["slope"])
            found[block_name(layer, role)] = OutputGradients(len(tokens), **mean)
    return found, total / len(tokens)
