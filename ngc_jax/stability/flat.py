"""States as vectors: any pytree of floating-point arrays, ravelled, and step functions that act on the vectors.

Lengths, angles and singular values in this package are those of the Euclidean space of all numbers of a state in one
vector. Another unit for a part of the state is another geometry: scale the state before measuring.

Legend: N numbers in a state, M in another one, T steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError

# Any pytree of floating-point arrays.
State: TypeAlias = Any
# state -> state, or (state, input) -> state if every step has an input.
Step: TypeAlias = Callable[..., State]
Unravel: TypeAlias = Callable[[Array], State]


def ravel(state: State) -> tuple[Float[Array, " n"], Unravel]:
    """All numbers of a state in one vector.

    Args:
        state: A pytree of floating-point arrays.

    Returns:
        The vector (N,), of the type to which the leaves' types promote, and the inverse function.

    Raises:
        UsageError: If the state has no numbers, or a leaf is not of floating point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path) or "the state itself"
            raise UsageError(
                f"a state has {jnp.result_type(leaf)} at {name}; expected floating point: pass everything that is not "
                "perturbed as a constant of the step function"
            )
    x_N, unravel = ravel_pytree(state)
    if not x_N.size:
        raise UsageError("a state without numbers; expected a pytree with at least one array that is not empty")
    return x_N, unravel


def flatten_map(f: Callable[[State], State], state: State) -> tuple[Float[Array, " n"], Callable[[Array], Array]]:
    """A map from states to any other states, as a map from vectors to vectors.

    Args:
        f: The map. Its result may have another structure and size.
        state: Where to evaluate it.

    Returns:
        The state's vector (N,) and the map (N,) -> (M,).
    """
    x_N, unravel = ravel(state)
    return x_N, lambda x_N: ravel(f(unravel(x_N)))[0]


def flatten_step(
    step: Step, state: State, inputs: Any = None
) -> tuple[Float[Array, " n"], Unravel, Callable[[Array, Any], Array]]:
    """A step function as a map of vectors to vectors of the same space.

    Args:
        step: `step(state)`, or `step(state, input)` if there are inputs.
        state: A state.
        inputs: A pytree whose leaves have a leading axis, one entry for each step; None for none.

    Returns:
        The state's vector (N,), the inverse function, and the step (N,), input -> (N,).

    Raises:
        UsageError: If the result of `step` is not like the state.
    """
    x_N, unravel = ravel(state)

    def flat_step(x_N: Array, input_: Any) -> Array:
        after = step(unravel(x_N)) if inputs is None else step(unravel(x_N), input_)
        return ravel(after)[0]

    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    expected = jax.tree.map(_describe, unravel(x_N))
    arguments = (unravel(x_N),) if inputs is None else (unravel(x_N), first)
    got = jax.tree.map(_describe, jax.eval_shape(step, *arguments))
    if got != expected:
        raise UsageError(f"the step function maps a state {expected} to {got}; expected the same shapes and types")
    return x_N, unravel, flat_step


def count_steps(inputs: Any, steps: int | None, *, transient: int = 0, every: int = 1) -> int:
    """Number of measured steps.

    Args:
        inputs: As in `flatten_step`; the first `transient` entries are those of the steps that are not measured.
        steps: Number of steps to measure; None for all inputs.
        transient: Number of steps before those.
        every: Number of steps measured together.

    Raises:
        UsageError: If the number is not given, disagrees with the inputs, or is not a multiple
            of `every`.
    """
    entries = count_entries(inputs) if jax.tree.leaves(inputs) else None
    if steps is None:
        if entries is None:
            raise UsageError("neither steps nor inputs were given; expected one of them: pass steps=")
        steps = entries - transient
    if entries is not None and entries != transient + steps:
        raise UsageError(f"inputs for {entries} steps; expected {transient} transient ones and {steps} more")
    if every < 1 or transient < 0 or steps < 1 or steps % every or transient % every:
        raise UsageError(
            f"{steps} steps after {transient} transient ones, {every} at a time; expected at least 1 step and "
            f"multiples of {every}: change steps, transient or every"
        )
    return steps


def count_entries(trajectory: State) -> int:
    """The number T of entries in a trajectory or in inputs, a pytree whose leaves have a leading axis T.

    Raises:
        UsageError: If the leaves do not agree.
    """
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(trajectory)}
    if len(lengths) != 1:
        raise UsageError(
            f"leaves with {sorted(lengths)} entries in a trajectory or in inputs; expected one entry for each step, in "
            "the leading axis of every leaf"
        )
    return lengths.pop()


def ravel_trajectory(trajectory: State) -> Float[Array, "t n"]:
    """The vectors (T, N) of a trajectory, a pytree whose leaves have a leading axis T.

    Raises:
        UsageError: If the leaves do not agree, or one is not of floating point.
    """
    count_entries(trajectory)
    return jax.vmap(lambda state: ravel(state)[0])(trajectory)


def working_type(*types: Any) -> Any:
    """The type in which frames and singular values are computed: at least float32."""
    return functools.reduce(np.promote_types, map(jnp.result_type, types), np.dtype(np.float32))


def vary_like(array: Array, reference: Array) -> Array:
    """The same array, of the same kind as a reference inside `jax.shard_map`: one value on each device.

    A constant counts as one value for all devices, and a scan does not let such a carry vary by device.
    """
    return jnp.where(jnp.isnan(reference.reshape(-1)[0]), array, array)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
