"""Which parameters train."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import traverse_util

from ngc_jax.errors import UsageError
from ngc_jax.types import Params

Trainable = Literal["states", "states_and_norms", "all"]


def split_params(params: Params, trainable: Trainable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into those that train and those that are frozen.

    Args:
        params: A decoder's.
        trainable: The neuron `states` of all groups, `states_and_norms` (the scales of every norm too), or `all`.

    Returns:
        Trained and frozen, two trees that `merge_params` joins again. No array is copied.

    Raises:
        UsageError: If nothing would train.
    """
    if trainable not in get_args(Trainable):
        raise UsageError(f"trainable is {trainable!r}; expected one of {', '.join(get_args(Trainable))}")
    flat = traverse_util.flatten_dict(dict(params))
    trained = {path: leaf for path, leaf in flat.items() if _trains(path, trainable)}
    if not any(path[0] == "groups" for path in trained) and trainable == "states":
        raise UsageError("the model has no neuron states to train, it is dense; choose trainable: all")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def _trains(path: tuple[str, ...], trainable: Trainable) -> bool:
    if trainable == "all" or path[0] == "groups":
        return True
    return trainable == "states_and_norms" and any(part.endswith("norm") for part in path)


def merge_params(trained: Params, frozen: Params) -> dict[str, Any]:
    """Join both trees."""
    flat = traverse_util.flatten_dict(dict(frozen)) | traverse_util.flatten_dict(dict(trained))
    return traverse_util.unflatten_dict(flat)


def cast_matrices(params: Any, dtype: jnp.dtype) -> Any:
    """Matrices in the type in which a decoder uses them, to save memory; vectors, such as norms' scales, unchanged."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
