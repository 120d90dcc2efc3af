"""Models of random weights, drawn on the device."""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngc_jax.groups.quantised import QuantisedMatrix
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params

# Numbers that share a scale, the default of quantisation.
_SCALED = 64


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, deviation: float, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(deviation, dtype)


@partial(jax.jit, static_argnames="shape")
def _codes(key: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(key, shape, -127, 128, jnp.int8)


def random_params(decoder: Decoder, dtype: Any = None, *, int8: bool = False) -> Params:
    """Parameters of unit gain: matrices normal with variance 1 / inputs, scales one, biases zero.

    One small program for each shape: initialising through linen would compile one for the whole model.

    Args:
        decoder: The module.
        dtype: Of the parameters; the decoder's if None.
        int8: Store matrices as 8-bit codes with scales; codes are uniform.
    """
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"])
    dtype = jnp.dtype(decoder.param_dtype if dtype is None else dtype)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        if len(shape) < 2:
            return jnp.full(shape, path[-1] == "scale", dtype)
        axis = 0 if path[-1] == "input_states" else 1  # the axis that products sum over
        key = jax.random.key(zlib.crc32("/".join(path).encode()))
        deviation = max(shape[axis], 1) ** -0.5
        if not int8:
            return _normal(key, deviation, shape=shape, dtype=dtype)
        rows, width = shape[1 - axis], shape[axis]
        groups = -(-width // _SCALED)
        scales = jnp.full((groups, rows), deviation * 3**0.5 / 127, dtype)
        codes = _codes(key, shape=(groups * _SCALED, rows))
        return QuantisedMatrix(codes, scales, None, 8, _SCALED, (shape[0], shape[1]), axis)

    return traverse_util.unflatten_dict({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def random_model(config: DecoderConfig, dtype: Any) -> LanguageModel:
    """A dense model without a tokenizer."""
    decoder = Decoder(config, None, jnp.dtype(dtype))
    return LanguageModel("random", config, None, random_params(decoder), {}, _no_tokenizer)


def _no_tokenizer() -> Any:
    raise AssertionError("random models have no tokenizer")


def random_tokens(shape: int | tuple[int, ...], vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def gigabytes(tree: Any) -> float:
    """Size of all arrays of a tree, in 10^9 bytes."""
    return float(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9)


def memory() -> dict[str, float]:
    """Memory of the device that is in use, and the most so far, in 10^9 bytes; empty where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    names = {"in use (GB)": "bytes_in_use", "most so far (GB)": "peak_bytes_in_use"}
    return {name: stats[key] / 1e9 for name, key in names.items() if key in stats}
