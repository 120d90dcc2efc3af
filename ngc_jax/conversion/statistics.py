"""Calibration: statistics of every block's inputs, streamed layer by layer.

Legend: K batches of a stack, B windows of a batch, L tokens, D width of a block's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ngc_jax.conversion.layerwise import BATCHES_PER_CALL, Compensated, each_batch, stack_batches
from ngc_jax.conversion.symmetric_sums import add_products, mean_product, no_products
from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.host_memory import handed_over
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.decoder import BLOCK_INPUTS, INPUT_SITE, Decoder, DecoderLayer
from ngc_jax.models.load import LanguageModel
from ngc_jax.tokens import as_tokens
from ngc_jax.types import Params


@dataclasses.dataclass(frozen=True)
class OutputGradients:
    """Backward-pass statistics of a block; g is the gradient of the loss, summed over tokens, by the block's output.

    Attributes:
        count: Tokens measured.
        mean_square: Diagonal of G = E[g g^T], (M,), float64.
        second_moment: G, (M, M), or W^T G W, (I, I), when the block has more outputs than inputs and G was not
            requested; None if only the diagonal was measured.
        slope: The mean of g^T (W - W_0) x over tokens: how fast the loss rises as the block's weight continues from
            W_0, the teacher's, beyond W; None unless requested.
    """

    count: int
    mean_square: np.ndarray
    second_moment: np.ndarray | None = None
    slope: float | None = None


@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """A block's inputs on the first tokens: their number, and E[x x^T], (d_in, d_in), float32."""

    count: int
    second_moment: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics that calibration measured for a block.

    Attributes:
        count: Tokens measured.
        second_moment: C = E[x x^T], (d_in, d_in), float64.
        absolute_mean: E|x|, (d_in,), float64.
        fisher: The mean square gradient of the loss by each column of the weight, summed over outputs, (d_in,),
            float64; None unless requested.
        gradients: Of the loss by the block's outputs; None unless requested.
        first: Of the tokens that were read before `calibrate` began; None unless requested.
        site: The input site, such as `layers.3.attn_input`. Blocks with the same site read the same input. Empty if no
            other block reads it.
    """

    count: int
    second_moment: np.ndarray
    absolute_mean: np.ndarray
    fisher: np.ndarray | None = None
    gradients: OutputGradients | None = None
    first: FirstTokens | None = None
    site: str = ""


class Moments(NamedTuple):
    """Running sums over the tokens of one input site; second moments are `symmetric_sums.Bands`."""

    second: tuple[Compensated, ...]
    absolute: Compensated


def init_moments(width: int) -> Moments:
    """Empty sums for inputs of `width` neurons."""
    return Moments(no_products(width), Compensated.zeros_like(jnp.zeros(width)))


class InputSums:
    """Sums over the inputs of all blocks: begun by a pass over some tokens, completed by `calibrate`.

    Attributes:
        count: Tokens read.
        layers: By layer and input site.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.count = 0
        self.layers = {layer: _init_sites(config) for layer in range(config.num_layers)}


def _init_sites(config: DecoderConfig) -> dict[str, Moments]:
    return {INPUT_SITE[role]: init_moments(config.block(0, role).d_in) for role in INPUT_SITE}


def add_tokens(moments: Moments, x_BxLxD: Float[Array, "B L D"], mask_BxL: Float[Array, "B L"] | None) -> Moments:
    """Add the tokens whose mask is 1.

    Args:
        moments: Sums so far.
        x_BxLxD: Inputs of a block.
        mask_BxL: 1 for a token, 0 for padding; None if there is none.
    """
    x_TxD = token_rows(x_BxLxD, mask_BxL)
    return Moments(add_products(moments.second, x_TxD), moments.absolute.add(jnp.abs(x_TxD).sum(axis=0)))


def token_rows(x_BxLxD: Float[Array, "B L D"], mask_BxL: Float[Array, "B L"] | None) -> Float[Array, "T D"]:
    """The tokens of a batch below each other, in float32; rows of zeros where the mask is 0."""
    x = x_BxLxD.astype(jnp.float32)
    # A product with a mask of ones would take a fifth of the time of the sums on a CPU.
    return (x if mask_BxL is None else x * mask_BxL[..., None]).reshape(-1, x.shape[-1])


def layer_kind(config: DecoderConfig, layer: int) -> int:
    """The first layer with the same computation: same window, same rotary embedding."""
    kinds = list(zip(config.windows, config.ropes, strict=True))
    return kinds.index(kinds[layer])


@partial(jax.jit, static_argnames=("config", "kind", "mesh"))
def run_layer(
    params: Params,
    x: Float[Array, "K B L D"],
    positions: Int[Array, "K B L"],
    *,
    config: DecoderConfig,
    kind: int,
    mesh: Mesh | None = None,
) -> Float[Array, "K B L D"]:
    """The residual streams of a stack after a dense layer; `kind` from `layer_kind`, `mesh` as for `each_batch`."""
    layer = DecoderLayer(config, Plan(), kind, x.dtype)

    def step(params: Params, data: Mapping[str, Array], x: Array, sums: None) -> tuple[Array, None]:
        return layer.apply({"params": params}, x, data["positions"])[0], sums

    return each_batch(step, params, {"positions": positions}, x, None, mesh=mesh)[0]


@partial(jax.jit, static_argnames=("config", "kind", "mesh"), donate_argnames=("moments",))
def read_layer(
    params: Params,
    x: Float[Array, "K B L D"],
    positions: Int[Array, "K B L"],
    mask: Float[Array, "K B L"] | None,
    moments: dict[str, Moments],
    *,
    config: DecoderConfig,
    kind: int,
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, Moments]]:
    """Run one dense layer on a stack of batches and add its blocks' inputs to the sums.

    Args:
        params: The layer's.
        x: The residual streams before it.
        positions: Of the tokens.
        mask: 1 for a token, 0 for padding; None if there is none.
        moments: Sums so far, by input site.
        config: The architecture.
        kind: From `layer_kind`.
        mesh: As for `each_batch`.

    Returns:
        The residual streams after it, and the sums.
    """
    layer = DecoderLayer(config, Plan(), kind, x.dtype)

    def step(
        params: Params, data: Mapping[str, Any], x: Array, moments: dict[str, Moments]
    ) -> tuple[Array, dict[str, Moments]]:
        (y, _), sown = layer.apply({"params": params}, x, data["positions"], mutable=[BLOCK_INPUTS])
        inputs = sown[BLOCK_INPUTS]
        new = {site: add_tokens(sums, _at_site(inputs, site), data["mask"]) for site, sums in moments.items()}
        return y, new

    return each_batch(step, params, {"positions": positions, "mask": mask}, x, moments, mesh=mesh)


def sown_input(sown: Mapping[str, Any], role: str) -> Array:
    """The input of the block of this role, (B, L, I), from what its layer has sown."""
    return _at_site(sown, INPUT_SITE[role])


def _at_site(sown: Mapping[str, Any], site: str) -> Array:
    value: Any = sown
    for part in site.split("."):
        value = value[part]
    return value[0]


_Stream = Iterator[tuple[int, dict[str, "Statistics"]]]


def _or_of_a_model(function: Callable[..., _Stream]) -> Callable[..., _Stream]:
    """Lets a `LanguageModel` take the place of architecture and parameters."""

    @wraps(function)
    def wrapped(config: DecoderConfig | LanguageModel, *args: Any, **options: Any) -> _Stream:
        if isinstance(config, DecoderConfig):
            return function(config, *args, **options)
        # These import this module.
        from ngc_jax.conversion.measure import check_dense
        from ngc_jax.conversion.state import Calibration

        if not isinstance(config, LanguageModel):
            raise UsageError(f"calibrate was given {type(config).__name__}; expected a model, or its config")
        check_dense(config)
        given = options.pop("tokens") if "tokens" in options else args[0] if args else None
        if given is None or len(args) > 1:
            raise UsageError("calibrate needs a text or token ids after the model, and names for all that follows")
        made = Calibration.of(config, given, window=options.get("window", 1024))
        return function(config.config, config.params, made.tokens, **options)

    return wrapped


@_or_of_a_model
def calibrate(
    config: DecoderConfig,
    params: Params,
    tokens: np.ndarray,
    *,
    begun: InputSums | None = None,
    keep_first: bool = False,
    window: int = 1024,
    batch_size: int = 4,
    batches_per_call: int = BATCHES_PER_CALL,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, dict[str, Statistics]]]:
    """Measure the inputs of every block of a dense model, one layer after the other.

    All tokens pass through a layer before the next one runs, so that only one layer's sums exist at a time and one
    compiled function serves every layer.

    Args:
        config: The architecture. Or a dense `LanguageModel`, without `params`; `tokens` are then whatever
            `Calibration.of` takes, such as a text, and windows get the model's prefix.
        params: Dense parameters.
        tokens: (T,), one stream of token ids; cut into windows. It includes the prefix of each window, see
            `ngc_jax.tokens.begin_windows`.
        begun: Sums over tokens that were read before these; consumed layer by layer.
        keep_first: Also yield the statistics of the tokens of `begun` alone.
        window: Tokens in a window.
        batch_size: Windows that run at once, on each device.
        batches_per_call: Batches of a stack.
        mesh: As for `each_batch`; the parameters are on all of its devices.
        progress: Called with (layer batches done, total).

    Yields:
        A layer's number and the statistics of its blocks by name. Blocks with the same input site share the arrays.

    Raises:
        UsageError: If there are no tokens or they are not the model's, or a layer's activations are not finite.

    Example:
        >>> for layer, statistics in calibrate(model, "A long text ..."):  # doctest: +SKIP
        ...     print(layer, sorted(statistics))
    """
    tokens = as_tokens(tokens, config.vocab_size, least=0)
    count = len(tokens) + (0 if begun is None else begun.count)
    if count < 1:
        raise UsageError("there are no tokens to calibrate on; give a longer text")
    stacks = stack_batches(tokens, window, batch_size, batches_per_call, mesh) if len(tokens) else []
    counts = np.cumsum([stack.used() for stack in stacks])
    dtype = jax.tree.leaves(params["layers"])[0].dtype
    decoder = Decoder(config, param_dtype=dtype)
    embed = jax.jit(lambda p, t: decoder.apply({"params": p}, t, method="embedded"))
    streams = [embed({"embed": params["embed"]}, stack.tokens) for stack in stacks]
    for layer in range(config.num_layers):
        moments = _init_sites(config) if begun is None else begun.layers.pop(layer)
        first: dict[str, FirstTokens] = {}
        if begun is not None and keep_first:
            first = {
                site: FirstTokens(begun.count, mean_product(sums.second, begun.count).astype(np.float32))
                for site, sums in moments.items()
            }
        for index, stack in enumerate(stacks):
            streams[index], moments = read_layer(
                params["layers"][str(layer)],
                streams[index],
                stack.positions,
                stack.mask,
                moments,
                config=config,
                kind=layer_kind(config, layer),
                mesh=mesh,
            )
            if progress is not None:
                jax.block_until_ready(moments)
                progress(layer * int(counts[-1]) + int(counts[index]), config.num_layers * int(counts[-1]))
        by_site = {
            site: _statistics(moments.pop(site), count, first.get(site), f"layers.{layer}.{site}")
            for site in list(moments)
        }
        for site, statistics in by_site.items():
            if not np.isfinite(statistics.second_moment).all():
                raise UsageError(
                    f"the activations of layer {layer} ({site}) are not finite; load the model with --dtype float32"
                )
        by_name = {block_name(layer, role): by_site[site] for role, site in INPUT_SITE.items()}
        del by_site, statistics
        yield layer, handed_over(by_name)


def _statistics(moments: Moments, count: int, first: FirstTokens | None, site: str) -> Statistics:
    second, absolute = mean_product(moments.second, count), moments.absolute.value() / count
    return Statistics(count, second, absolute, first=first, site=site)
