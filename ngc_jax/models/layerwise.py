"""Single layers of a decoder, and batches of windows that one compiled call passes through a layer in sequence.

This is the one place outside the decoder where a layer runs by itself: calibration, gradients and error propagation
stream through it, stability differentiates it.

Legend: K batches of a stack, B sequences (windows) of a batch, L tokens, D residual width, I inputs of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ngc_jax.groups.plan import Plan
from ngc_jax.models.attention import LayerCache
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.experts import BLOCK_INPUTS
from ngc_jax.models.images import ImageStream, check_stream
from ngc_jax.models.layers import INPUT_SITE, DecoderLayer
from ngc_jax.text import split_windows
from ngc_jax.tokens import as_tokens
from ngc_jax.types import Params

Streams = TypeVar("Streams")
Sums = TypeVar("Sums")
# The routing of a mixture of experts, among the inputs of its layer.
ROWS = "mlp.rows"
# The axis of a mesh that the windows of a batch are sharded over.
_WINDOWS_AXIS = "data"
# Batches that a compiled layer processes in one call. The system allocates a call's working memory again every time,
# page by page, which on a CPU takes a tenth of the time of one batch.
BATCHES_PER_CALL = 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and its arrays.

    Attributes:
        module: From `layer_module`.
        params: Its parameters.
        groups: States of the groups that have a member in it.
    """

    module: DecoderLayer
    params: Params
    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        cache: LayerCache | None = None,
        starts: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        """The residual stream after the layer, and its new cache; arguments as for `DecoderLayer`."""
        variables = {"params": self.params}
        return cast(Any, self.module.apply(variables, x, positions, cache, self.groups, starts))

    def read(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        cache: LayerCache | None = None,
        starts: Int[Array, "B L"] | None = None,
        *,
        perturbations: Params | None = None,
    ) -> tuple[Float[Array, "B L D"], dict[str, Float[Array, "B L I"]]]:
        """The residual stream after the layer, and the inputs of its blocks by site.

        Args:
            x: The residual stream before it.
            positions: As for `DecoderLayer`.
            cache: As for `DecoderLayer`.
            starts: As for `DecoderLayer`.
            perturbations: Added to the outputs of blocks, whose gradients are then those by the outputs.
        """
        variables = {"params": self.params}
        if perturbations is not None:
            variables["perturbations"] = perturbations
        given = (x, positions, cache, self.groups, starts)
        (y, _), sown = cast(Any, self.module.apply(variables, *given, mutable=[BLOCK_INPUTS]))
        return y, inputs_by_site(sown[BLOCK_INPUTS])


def inputs_by_site(sown: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a layer's blocks by `INPUT_SITE`, from the collection that it sows.

    Of a mixture of experts the inputs of d are those of `experts.Rows`, (R, F), and the rows are the entry `ROWS`.
    """
    found = {}
    sites = [*dict.fromkeys(INPUT_SITE.values()), *([ROWS] if "rows" in sown["mlp"] else [])]
    for site in sites:
        value: Any = sown
        for part in site.split("."):
            value = value[part]
        found[site] = value[0]
    return found


def depth_of(decoder: Decoder) -> int:
    """Number of layers that a token passes: those of the model times its iterations."""
    return decoder.config.num_layers * decoder.config.iterations


def layer_module(decoder: Decoder, number: int, *, hold_others: bool = False) -> DecoderLayer:
    """The computation of a layer, without arrays; hashable, for a static argument.

    Layers of a dense decoder that compute the same (same window, same rotary embedding) have the same module, so that
    one compiled function serves them.

    Args:
        decoder: The decoder.
        number: Which layer, from 0; numbered consecutively through the iterations.
        hold_others: Keys and values of all other tokens are those of the cache; see `DecoderLayer`.
    """
    config, plan = decoder.config, decoder.plan or Plan()
    layer = number % config.num_layers
    if not plan.groups:
        sparse = [config.is_sparse(layer) for layer in range(config.num_layers)]
        kinds = list(zip(config.windows, config.ropes, sparse, strict=True))
        layer = kinds.index(kinds[layer])
    return DecoderLayer(config, plan, layer, decoder.param_dtype, hold_others)


def layer_of(decoder: Decoder, params: Params, number: int, *, hold_others: bool = False) -> Layer:
    """A layer of a decoder with its part of the decoder's parameters; arguments as for `layer_module`."""
    module = layer_module(decoder, number, hold_others=hold_others)
    return Layer(module, params["layers"][str(number % decoder.config.num_layers)], params.get("groups", {}))


@partial(jax.jit, static_argnames="decoder")
def _embed(
    params: Params,
    tokens: Int[Array, "*batch L"],
    positions: Int[Array, "*batch L"] | None,
    starts: Int[Array, "*batch L"] | None,
    *,
    decoder: Decoder,
) -> Float[Array, "*batch L D"]:
    # Image encoders have no positions of tokens.
    places: dict[str, Any] = {name: at for name, at in (("positions", positions), ("starts", starts)) if at is not None}
    return cast(Array, decoder.apply({"params": params}, tokens, **places, method="embedded"))


def embed(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "*batch L"],
    positions: Int[Array, "*batch L"] | None = None,
    starts: Int[Array, "*batch L"] | None = None,
) -> Float[Array, "*batch L D"]:
    """The residual streams before the first layer; `positions` and `starts` as for `Decoder`."""
    ends = {name: params[name] for name in ("embed", "position_embed") if name in params}
    return _embed(ends, tokens, positions, starts, decoder=decoder)


@partial(jax.jit, static_argnames=("layer", "mesh"))
def run_stack(
    params: Params,
    x: Float[Array, "K B L D"],
    positions: Int[Array, "K B L"],
    *,
    layer: DecoderLayer,
    mesh: Mesh | None = None,
) -> Float[Array, "K B L D"]:
    """The residual streams of a stack after a dense layer; `mesh` as for `each_batch`."""

    def step(params: Params, data: Mapping[str, Array], x: Array, sums: None) -> tuple[Array, None]:
        return Layer(layer, params)(x, data["positions"])[0], sums

    return each_batch(step, params, {"positions": positions}, x, None, mesh=mesh)[0]


class Compensated(NamedTuple):
    """A float32 sum and its rounding error."""

    total: Array
    lost: Array

    @classmethod
    def zeros_like(cls, x: Array) -> Compensated:
        """An empty sum."""
        return cls(jnp.zeros_like(x), jnp.zeros_like(x))

    def add(self, x: Array) -> Compensated:
        """Add x and keep what the total rounds off (Knuth's two-sum)."""
        total = self.total + x
        virtual = total - self.total
        error = (self.total - (total - virtual)) + (x - virtual)
        return Compensated(total, self.lost + error)

    def value(self) -> np.ndarray:
        """The sum in float64 on the host."""
        value = np.array(self.total, np.float64)
        value += np.asarray(self.lost)  # in place: these are the largest matrices of a conversion
        return value


class Stack(NamedTuple):
    """Batches that one call processes in sequence.

    Attributes:
        tokens: (K, B, L); for an image encoder `Images` of (K, B, ...).
        positions: (K, B, L); -1 for padding. Batches of padding alone come last and are skipped.
        mask: (K, B, L), 1 for a token, 0 for padding; None if the other batches have no padding.
    """

    tokens: Any
    positions: Int[Array, "K B L"]
    mask: Float[Array, "K B L"] | None

    def used(self) -> int:
        """Number of batches that have tokens."""
        return int((np.asarray(self.positions) >= 0).any(axis=(1, 2)).sum())


def checked_tokens(tokens: Any, config: DecoderConfig) -> Any:
    """What a model measures on: tokens (T,), possibly none, or a stream of images for an image encoder.

    Raises:
        UsageError: If they are not the model's.
    """
    if not config.causal or isinstance(tokens, ImageStream):
        return check_stream(tokens, config)
    return as_tokens(tokens, config.vocab_size, least=0)


def stack_batches(
    tokens: Int[np.ndarray, " T"] | ImageStream,
    window: int,
    batch_size: int,
    batches_per_call: int = BATCHES_PER_CALL,
    mesh: Mesh | None = None,
) -> list[Stack]:
    """Cut a token stream into stacks of batches of windows, all of the same shape.

    Args:
        tokens: (T,), one stream; or images, each of which is a window.
        window: L, or fewer if the stream is shorter.
        batch_size: B on each device.
        batches_per_call: K, or fewer if there are fewer batches.
        mesh: B is sharded over its axis "data"; None for one device.
    """
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, _WINDOWS_AXIS))
    size = batch_size * (1 if mesh is None else mesh.shape[_WINDOWS_AXIS])
    batches: list[Any]
    batches = tokens.batches(size) if isinstance(tokens, ImageStream) else split_windows(tokens, window, size)
    count = min(batches_per_call, len(batches))
    stacks = []
    for start in range(0, len(batches), count):
        some = batches[start : start + count]
        missing = ((0, count - len(some)), (0, 0), (0, 0))
        positions = np.stack([one for _, one in some])
        is_token = positions >= 0
        mask = None if is_token.all() else jax.device_put(np.pad(is_token.astype(np.float32), missing), place)
        positions = np.pad(positions, missing, constant_values=-1)
        ids = jax.tree.map(lambda *leaves: _stacked(leaves, count), *(one for one, _ in some))
        stacks.append(Stack(jax.device_put(ids, place), jax.device_put(positions, place), mask))
    return stacks


def _stacked(leaves: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Arrays of one shape below each other, and zeros for those that are missing."""
    made = np.zeros((count, *leaves[0].shape), leaves[0].dtype)
    made[: len(leaves)] = leaves
    return made


def each_batch(
    step: Callable[[Any, Mapping[str, Any], Streams, Sums], tuple[Streams, Sums]],
    params: Any,
    data: Mapping[str, Any],
    streams: Streams,
    sums: Sums,
    *,
    mesh: Mesh | None,
) -> tuple[Streams, Sums]:
    """Process in sequence the batches of a stack that have tokens.

    Args:
        step: Maps parameters, the data and streams of one batch, and the sums so far, to new streams and sums.
        params: Parameters, replicated on every device.
        data: Arrays (K, B, ...) or None; "positions" show which batches have tokens.
        streams: Pytree of arrays (K, B, ...).
        sums: Pytree of sums over tokens, replicated on every device.
        mesh: B is sharded over its axis "data": each device sums over its own windows, and the sums of all devices are
            added once, at the end. None for one device.

    Returns:
        Streams and sums.
    """

    def in_turn(params: Any, data: Mapping[str, Any], streams: Streams, sums: Sums) -> tuple[Streams, Sums]:
        def one(k: Array, carry: tuple[Streams, Sums]) -> tuple[Streams, Sums]:
            streams, sums = carry
            data_k, streams_k = jax.tree.map(lambda leaf: leaf[k], (data, streams))
            new_k, sums = step(params, data_k, streams_k, sums)
            return jax.tree.map(lambda leaf, new: leaf.at[k].set(new), streams, new_k), sums

        used = (data["positions"] >= 0).any(axis=(1, 2)).sum()
        return jax.lax.fori_loop(0, used, one, (streams, sums))

    if mesh is None:
        return in_turn(params, data, streams, sums)

    def on_device(params: Any, data: Mapping[str, Any], streams: Streams) -> tuple[Streams, Sums]:
        streams, own = in_turn(
            params, data, streams, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
        )
        return streams, jax.lax.psum(own, _WINDOWS_AXIS)

    same, shared_out = PartitionSpec(), PartitionSpec(None, _WINDOWS_AXIS)
    streams, added = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(same, shared_out, shared_out),
        out_specs=(shared_out, same),
        check_vma=False,  # the number of iterations differs by device, which the types cannot express
    )(params, data, streams)
    return streams, _add_sums(sums, added)


def _add_sums(sums: Sums, added: Sums) -> Sums:
    def add(one: Any, other: Any) -> Any:
        if not isinstance(one, Compensated):
            return one + other
        total = one.add(other.total)
        return Compensated(total.total, total.lost + other.lost)

    return jax.tree.map(add, sums, added, is_leaf=lambda x: isinstance(x, Compensated))
