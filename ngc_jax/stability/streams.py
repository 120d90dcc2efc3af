"""A language model as a dynamics of its residual stream: apply one layer, record a pass, form one token's maps.

The state of token t after l layers is its residual stream x_l[t]; layer l takes it to x_(l+1)[t].

Legend: B prompts, L tokens with padding, D embed, n layers times iterations (the depth).
Prompts are padded on the right; their tokens have the positions 0, 1, 2, ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.errors import UsageError
from ngc_jax.models.attention import Cache, LayerCache, init_cache
from ngc_jax.models.config import check_length, language_only
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layerwise import depth_of, embed, layer_of
from ngc_jax.models.load import LanguageModel
from ngc_jax.stability.flat import working_type
from ngc_jax.tokens import as_rows, check_ids
from ngc_jax.types import Params

_T = TypeVar("_T")


class Recording(NamedTuple):
    """The results of a forward pass of one prompt.

    Attributes:
        streams: (n+1, L, D) the residual stream before the first layer and after every one.
        cache: Keys, values and positions of every layer, of one sequence; slot t is token t's.
        positions: (L,) 0, 1, 2, ..., then -1 for padding.
    """

    streams: Float[Array, "m L D"]
    cache: Cache
    positions: Int[Array, " L"]


def apply_layer(
    decoder: Decoder,
    params: Params,
    number: int,
    x_LxD: Float[Array, "L D"],
    positions_L: Int[Array, " L"],
    cache: LayerCache | None = None,
    *,
    alone: bool = False,
) -> tuple[Float[Array, "L D"], LayerCache | None]:
    """One layer of the decoder, applied to one sequence.

    Args:
        decoder: The module.
        params: Its parameters.
        number: Which layer, from 0; numbered consecutively through the iterations.
        x_LxD: Residual stream.
        positions_L: Positions; -1 for padding.
        cache: Of this layer, or None.
        alone: Whether every token attends to itself only.

    Returns:
        The residual stream after the layer, and the layer's new cache (None without one).
    """
    starts_1xL = positions_L[None] if alone else None
    y_1xLxD, after = layer_of(decoder, params, number)(x_LxD[None], positions_L[None], cache, starts_1xL)
    return y_1xLxD[0], after


def token_maps(
    decoder: Decoder, params: Params, recording: Recording, position: Int[Array, ""]
) -> list[Callable[[Array], Array]]:
    """The layers as maps of ONE token's stream, with the recorded streams of all other tokens held constant.

    Token t's own key and value change with it; those of the others are in the recorded cache. A map costs one token,
    not a sequence, and its Jacobian is the block d x_(l+1)[t] / d x_l[t] of the whole stream's.

    Args:
        decoder: The module.
        params: Its parameters.
        recording: Of the prompt.
        position: t. (For padding, -1, the maps are defined but meaningless.)

    Returns:
        n maps (D,) -> (D,).
    """
    position_1 = jnp.asarray(position, jnp.int32)[None]

    def of_layer(number: int) -> Callable[[Array], Array]:
        # The token is written into its own slot, t mod L, over its recorded entry.
        def advance(x_D: Array) -> Array:
            return apply_layer(decoder, params, number, x_D[None], position_1, recording.cache[number])[0][0]

        return advance

    return [of_layer(number) for number in range(depth_of(decoder))]


def check_prompts(
    decoder: Decoder, tokens_BxL: Int[Array, "B L"], lengths_B: Int[Array, " B"] | None
) -> Int[Array, " B"]:
    """Check a batch of prompts and return their lengths.

    Raises:
        UsageError: If the tokens are not a batch of at least one, there is not one length for each row, or the model
            has no positions for them.
    """
    if jnp.ndim(tokens_BxL) != 2 or not jnp.size(tokens_BxL) or not jnp.issubdtype(tokens_BxL.dtype, jnp.integer):
        raise UsageError(
            f"tokens of shape {jnp.shape(tokens_BxL)} and type {tokens_BxL.dtype}; expected whole numbers (B, L), "
            "at least one"
        )
    if decoder.remat:
        raise UsageError("the decoder recomputes its layers (remat); use LanguageModel.decoder")
    check_length(decoder.config, tokens_BxL.shape[1])
    if lengths_B is None:
        return jnp.full(tokens_BxL.shape[0], tokens_BxL.shape[1], jnp.int32)
    if jnp.shape(lengths_B) != tokens_BxL.shape[:1]:
        raise UsageError(
            f"lengths of shape {jnp.shape(lengths_B)} for {tokens_BxL.shape[0]} prompts; expected one each"
        )
    return jnp.asarray(lengths_B, jnp.int32)


def jit_on_prompts(*static: str) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """`jax.jit` for functions of a decoder and prompts, whose token ids and lengths are checked first.

    Inside of another transformation their values are unknown, and not checked.

    Args:
        static: Names of static arguments in addition to `decoder`. The function's others are `tokens_BxL` or
            `tokens_L`, and optionally `lengths_B`.

    Returns:
        A decorator. The decorated function also takes what `on_prompts` describes, and raises UsageError for ids
        outside the decoder's vocabulary and for lengths that exceed the rows.
    """

    def decorate(function: Callable[..., _T]) -> Callable[..., _T]:
        jitted = jax.jit(function, static_argnames=("decoder", *static))

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> _T:
            given = signature.bind(*args, **kwargs).arguments
            tokens = given.get("tokens_BxL", given.get("tokens_L"))
            check_known_ids(given["decoder"], tokens, given.get("lengths_B"))
            return jitted(*args, **kwargs)

        signature = inspect.signature(function)
        return on_prompts(checked)

    return decorate


def on_prompts(function: Callable[..., _T]) -> Callable[..., _T]:
    """Let a function of a decoder, its parameters and prompts take these in the forms in which people have them.

    A `LanguageModel` may take the place of decoder and parameters; its tokenizer then reads texts, with BOS by its own
    rule. Prompts may be a text, a list of texts, a list of ids, (L,), or a list of these of any lengths, which are
    padded. A prompt alone is a batch of one.

    Args:
        function: Of `decoder`, `params`, and `tokens_BxL` with `lengths_B`, or `tokens_L`.

    Returns:
        The function, which raises UsageError for any other form.
    """
    signature = inspect.signature(function)
    batched = "tokens_BxL" in signature.parameters
    name = "tokens_BxL" if batched else "tokens_L"

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> _T:
        model = args[0] if args and isinstance(args[0], LanguageModel) else None
        if model is not None:
            language_only(model.config, "a study of stability")
            args = (model.decoder, model.params, *args[1:])
        given = signature.bind(*args, **kwargs)
        tokens = given.arguments[name]
        rows_of = _batch if batched else _single
        if getattr(tokens, "ndim", 0) == (2 if batched else 1):
            return function(*args, **kwargs)
        given.arguments.update(rows_of(as_rows(tokens, functools.partial(_read, model)), given.arguments))
        return function(*given.args, **given.kwargs)

    return wrapped


def _read(model: LanguageModel | None, text: str) -> np.ndarray:
    if model is None:
        raise UsageError(
            f"a text was given ({text[:20]!r}), and a decoder has no tokenizer to read it; give the LanguageModel in "
            "place of decoder and parameters, or token ids"
        )
    return model.load_tokenizer().encode_prompt(text)


def _single(rows: list[np.ndarray], given: Mapping[str, Any]) -> dict[str, Any]:
    if len(rows) != 1:
        raise UsageError(f"{len(rows)} prompts; expected one, (L,)")
    check_ids(rows[0], given["decoder"].config.vocab_size)
    return {"tokens_L": jnp.asarray(rows[0])}


def _batch(rows: list[np.ndarray], given: Mapping[str, Any]) -> dict[str, Any]:
    """One array of all rows; with lengths if they differ."""
    for index, row in enumerate(rows):
        if row.ndim != 1 or not len(row) or row.dtype.kind not in "iu":
            raise UsageError(
                f"prompt {index} has shape {row.shape} and type {row.dtype}; expected whole numbers (L,), at least one"
            )
        check_ids(row, given["decoder"].config.vocab_size)
    lengths = [len(row) for row in rows]
    width = max(lengths, default=0)
    tokens = {"tokens_BxL": jnp.asarray([np.pad(row, (0, width - len(row))) for row in rows], jnp.int32)}
    if len(set(lengths)) < 2:
        return tokens
    if given.get("lengths_B") is not None:
        raise UsageError("prompts of different lengths and lengths were given; expected one of these")
    return {**tokens, "lengths_B": jnp.asarray(lengths, jnp.int32)}


@on_prompts
def record(
    decoder: Decoder, params: Params, tokens_L: Int[Array, " L"], length: Int[Array, ""] | int | None = None
) -> Recording:
    """Run one prompt and record its residual streams and caches.

    Args:
        decoder: The module.
        params: Its parameters.
        tokens_L: The prompt, padded on the right with any token.
        length: Number of tokens in the prompt, without padding; all if None.

    Returns:
        (n+1) · L · D numbers of streams, and the cache.

    Raises:
        UsageError: If a token id is not in the model's vocabulary.
    """
    check_known_ids(decoder, tokens_L)
    index_L = jnp.arange(tokens_L.shape[0], dtype=jnp.int32)
    positions_L = index_L if length is None else jnp.where(index_L < length, index_L, -1)
    x_LxD = embed(decoder, params, tokens_L)
    empty = init_cache(decoder.config, 1, 0, decoder.compute_dtype)
    streams: list[Array] = [x_LxD]
    caches: list[Any] = []
    for number in range(depth_of(decoder)):
        x_LxD, cache = apply_layer(decoder, params, number, x_LxD, positions_L, empty[number])
        streams.append(x_LxD)
        caches.append(cache)
    return Recording(jnp.stack(streams), tuple(caches), positions_L)


def check_known_ids(decoder: Decoder, tokens: Any, lengths_B: Any = None) -> None:
    """Refuse token ids outside a decoder's vocabulary, unless they are traced; padding may be any number.

    Raises:
        UsageError: If there is one, or a length is not valid for its row.
    """
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths_B, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    if lengths_B is not None and ids.ndim == 2 and np.shape(lengths_B) == ids.shape[:1]:
        lengths = np.asarray(lengths_B)
        if lengths.min(initial=0) < 0 or lengths.max(initial=0) > ids.shape[1]:
            raise UsageError(f"lengths {lengths.tolist()} of rows of {ids.shape[1]} tokens; expected 0 to that number")
        ids = ids[np.arange(ids.shape[1]) < lengths[:, None]]
    if np.issubdtype(ids.dtype, np.integer):
        check_ids(ids, decoder.config.vocab_size)


def without_padding(result: Any, positions_L: Int[Array, " L"], instead: float) -> Any:
    """A pytree whose leaves have a leading axis L, with `instead` where there is padding."""

    def fill(leaf: Array) -> Array:
        return jnp.where((positions_L >= 0).reshape(-1, *[1] * (leaf.ndim - 1)), leaf, instead)

    return jax.tree.map(fill, result)


def widened(tree: Any) -> Any:
    """Every leaf in float32 at least: differences of streams in a smaller type are mostly rounding."""
    return jax.tree.map(lambda leaf: leaf.astype(working_type(leaf)), tree)


def log_length(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Logarithm of the Euclidean length over the last axis."""
    return 0.5 * jnp.log(jnp.sum(jnp.square(widened(vectors)), axis=-1))
