"""Interaction kernels: pure functions from the neuron states of one group to its weights and outputs.

Every kernel factors as W = phi_out(Q_out) · M · phi_in(Q_in)^T, so a member's y = x W^T is computed in two
small products and W is never formed:

    signal = encode(x) = x · phi_in(Q_in) · M        broadcast by the group, computed once
    y      = read(signal) = signal · phi_out(Q_out)^T        one per member

M is applied when the signal is computed, and only there: a group whose members read one input applies it once.

Products have the type of x and accumulate in float32 at least.

In the fixed gauge of a bilinear group (`pivots`, see `gauge.py`) the input states of R neurons are the unit vectors:
their inputs are added to the signal directly, and only the states of the others are stored.

Shape suffixes: I inputs of a member, J outputs of a member, R rank, S signal width (R, or the lifted
features), P those of the inputs that are pivots, O the others.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.groups.gauge import Indices, other_neurons, stored_rows
from ngc_jax.groups.kernel_spec import Kernel, count_parameters, logical_axes
from ngc_jax.groups.quantised import QuantisedMatrix, contract
from ngc_jax.groups.states import States, fixed_lift, from_bilinear, init_states

__all__ = [
    "Kernel",
    "States",
    "count_parameters",
    "encode",
    "encoder",
    "forward",
    "from_bilinear",
    "init_states",
    "input_features",
    "interaction",
    "logical_axes",
    "output_features",
    "read",
    "weights",
]

# The metric's diagonal is limited to exp(±40), about 4e-18 to 2e17: positive and finite in every floating
# type.
_LOG_LIMIT = 40.0
# Number of tokens from which on a group in the fixed gauge also multiplies by the unit states: gathering the
# activations of the others, and scattering their gradients, then takes longer.
_MANY_TOKENS = 128


def encode(
    kernel: Kernel, states: States, x: Float[Array, "*batch i"], *, pivots: Sequence[int] | None = None
) -> Float[Array, "*batch s"]:
    """The signal that a group broadcasts for an input: x · phi_in · M.

    Args:
        kernel: The group's kernel.
        states: The group's states.
        x: Activations (..., I). A member with fewer inputs than the group reads the first I input states,
            which equals padding x with zeros.
        pivots: The group's pivots if its gauge is fixed.

    Returns:
        The signal (..., S), of x's type.

    Raises:
        UsageError: If x is wider than the group's input, or the pivots do not fit the kernel or the states.
    """
    if pivots is not None:
        return _encode_in_fixed_gauge(kernel, states, x, pivots).astype(x.dtype)
    signal = contract(x, _encoder(kernel, states, x.shape[-1]), axis=0)
    return _apply_interaction(kernel, states, signal).astype(x.dtype)


def read(kernel: Kernel, states: States, member: str, signal: Float[Array, "*batch s"]) -> Float[Array, "*batch j"]:
    """The outputs that one member computes from its group's signal: signal · phi_out^T.

    Args:
        kernel: The group's kernel.
        states: The group's states.
        member: Block name.
        signal: The signal (..., S) from `encode`.

    Returns:
        The member's outputs (..., J), of the signal's type.

    Raises:
        UsageError: If the group has no such member.
    """
    features = states["output_states"].get(member)
    if not isinstance(features, QuantisedMatrix) or kernel.name == "lifted":
        features = output_features(kernel, states, member)
    return contract(signal, features).astype(signal.dtype)


def forward(
    kernel: Kernel,
    states: States,
    member: str,
    x: Float[Array, "*batch i"],
    *,
    pivots: Sequence[int] | None = None,
) -> Float[Array, "*batch j"]:
    """Compute y = x W^T of one member, without forming W: `read` of `encode`. Arguments as theirs.

    Raises:
        UsageError: As `encode` and `read`.
    """
    return read(kernel, states, member, encode(kernel, states, x, pivots=pivots))


def weights(
    kernel: Kernel,
    states: States,
    member: str,
    d_in: int | None = None,
    *,
    pivots: Sequence[int] | None = None,
) -> Float[Array, "j i"]:
    """The member's weight matrix, formed: for tests, export and study.

    Args:
        kernel: The group's kernel.
        states: The group's states.
        member: Block name.
        d_in: The member's inputs when fewer than the group's.
        pivots: The group's pivots if its gauge is fixed.

    Returns:
        W (J, I), in float32 at least, by products of full precision on every device.

    Raises:
        UsageError: If the group has no such member, `d_in` exceeds the group's inputs, or the pivots do not fit the
            kernel or the states.
    """
    phi_JxS = _accurate(output_features(kernel, states, member))
    with jax.default_matmul_precision("highest"):
        return phi_JxS @ encoder(kernel, states, d_in, pivots=pivots).T


def encoder(
    kernel: Kernel, states: States, d_in: int | None = None, *, pivots: Sequence[int] | None = None
) -> Float[Array, "i s"]:
    """phi_in · M of the first `d_in` input states: the matrix by which `encode` multiplies its input, formed.

    In float32 at least, by products of full precision on every device. Arguments as for `input_features`.

    Raises:
        UsageError: As `input_features`.
    """
    with jax.default_matmul_precision("highest"):
        return _apply_interaction(kernel, states, _accurate(input_features(kernel, states, d_in, pivots=pivots)))


def input_features(
    kernel: Kernel, states: States, d_in: int | None = None, *, pivots: Sequence[int] | None = None
) -> Float[Array, "i s"]:
    """phi_in of the first `d_in` input states (all when None), those of pivots among them.

    Raises:
        UsageError: If the group has fewer inputs, or the pivots do not fit the kernel or the states.
    """
    q_IxR = _floating(states["input_states"])
    if pivots is not None:
        q_IxR = _with_pivots(q_IxR, stored_rows(pivots, _inputs(kernel, states, pivots)))
    _check_width(d_in, q_IxR.shape[0])
    return _features(kernel, states, q_IxR if d_in in (None, q_IxR.shape[0]) else q_IxR[:d_in])


def output_features(kernel: Kernel, states: States, member: str) -> Float[Array, "j s"]:
    """phi_out of a member's output states.

    Raises:
        UsageError: If the group has no such member.
    """
    members = states["output_states"]
    if member not in members:
        near = difflib.get_close_matches(member, list(members), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(members))}"
        raise UsageError(f"the group has no member {member!r}; {hint}")
    features = _features(kernel, states, _floating(members[member]))
    if kernel.name != "lifted":
        return features
    return features * states["amplitude"][member].astype(features.dtype)[:, None]


def interaction(kernel: Kernel, states: States) -> Float[Array, "s s"]:
    """M as a matrix (S, S): the identity, the metric, or the gain's multiple of the identity; for study."""
    width = kernel.signal_width(states["input_states"].shape[1])
    with jax.default_matmul_precision("highest"):
        return _apply_interaction(
            kernel, states, jnp.eye(width, dtype=_accurate(_floating(states["input_states"])).dtype)
        )


def _encode_in_fixed_gauge(
    kernel: Kernel, states: States, x: Float[Array, "*batch i"], pivots: Sequence[int]
) -> Float[Array, "*batch r"]:
    """The signal of a bilinear group, in the type in which products accumulate."""
    d_in, width = _inputs(kernel, states, pivots), x.shape[-1]
    _check_width(width, d_in)
    pivots_R, others_O = np.asarray(pivots, np.intp), other_neurons(pivots, d_in)
    if math.prod(x.shape[:-1]) >= _MANY_TOKENS:
        return contract(x, input_features(kernel, states, width, pivots=pivots), axis=0)
    # Both are ascending: the rows of an input with fewer neurons come first.
    pivots_P, others_O = pivots_R[pivots_R < width], others_O[others_O < width]
    rest_OxR = states["input_states"]
    if not isinstance(rest_OxR, QuantisedMatrix):
        rest_OxR = rest_OxR[: len(others_O)]
    signal = contract(_take(x, others_O), rest_OxR, axis=0)
    own = _take(x, pivots_P).astype(signal.dtype)
    # A pivot beyond the last neuron of a smaller input adds nothing to its dimension.
    return signal + jnp.pad(own, [(0, 0)] * (x.ndim - 1) + [(0, len(pivots_R) - len(pivots_P))])


def _inputs(kernel: Kernel, states: States, pivots: Sequence[int]) -> int:
    """Input neurons of a group in the fixed gauge."""
    rows, rank = states["input_states"].shape
    if kernel.name != "bilinear" or len(pivots) != rank or (rank and pivots[-1] >= rows + rank):
        raise UsageError(
            f"{len(pivots)} pivots for a group of kernel {kernel.name!r}, rank {rank} and {rows} stored input states;"
            " expected kernel 'bilinear' and one pivot for each latent dimension, out of stored states and pivots"
        )
    return rows + rank


def _check_width(width: int | None, d_in: int) -> None:
    if width is not None and width > d_in:
        raise UsageError(f"input of width {width} for a group of {d_in} input states; expected at most that")


def _take(x: Float[Array, "*batch i"], indices: Indices) -> Float[Array, "*batch n"]:
    # Known at compile time, ascending and unique: the compiler needs no guards.
    taken = jnp.asarray(x).at[..., indices]
    return taken.get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")


def _features(kernel: Kernel, states: States, q: Float[Array, "n r"]) -> Float[Array, "n s"]:
    if kernel.name != "lifted":
        return q
    lift = states["lift"] if kernel.learned else fixed_lift(q.shape[1], kernel.lift, kernel.seed)
    q = _accurate(q)
    return jnp.tanh(q @ jnp.asarray(lift, q.dtype))


def _apply_interaction(kernel: Kernel, states: States, signal: Float[Array, "*b s"]) -> Float[Array, "*b s"]:
    """Multiply by M, for a signal in float32 at least; M is symmetric."""
    if kernel.name == "riemannian":
        metric = states["metric"]
        diagonal_R = jnp.exp(jnp.clip(_accurate(metric["log_diagonal"]), -_LOG_LIMIT, _LOG_LIMIT))
        stretched = signal * diagonal_R.astype(signal.dtype)
        if "factor" not in metric:
            return stretched
        factor_RxK = metric["factor"].astype(signal.dtype)
        return stretched + (signal @ factor_RxK) @ factor_RxK.T
    if kernel.name == "lifted":
        # The constant keeps the gain near one, whatever the sizes: one learning rate then suits all
        # parameters.
        d_in = states["input_states"].shape[0]
        return signal * (states["gain"].astype(signal.dtype) * (d_in * kernel.lift) ** -0.5)
    return signal


def _encoder(kernel: Kernel, states: States, width: int) -> Any:
    """phi_in of the first `width` inputs; quantised if it is stored so."""
    stored = states["input_states"]
    if isinstance(stored, QuantisedMatrix) and kernel.name != "lifted":
        _check_width(width, stored.shape[0])
        return stored
    return input_features(kernel, states, width)


# One program for a shape, instead of one for every step.
@partial(jax.jit, inline=True)
def _with_pivots(q_OxR: Array, row_of_I: Any) -> Array:
    """The states of all inputs: of unit vectors, then of the others, by their rows."""
    q_IxR = jnp.concatenate([jnp.eye(q_OxR.shape[1], dtype=q_OxR.dtype), q_OxR])
    return q_IxR.at[row_of_I].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _floating(matrix: Any) -> Array:
    """A matrix as an array."""
    return matrix.dequantise() if isinstance(matrix, QuantisedMatrix) else matrix


def _accurate(array: Array) -> Array:
    return array.astype(np.promote_types(array.dtype, np.float32))
