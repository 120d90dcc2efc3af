"""Interaction kernels: how neuron states make weights, as pure functions over the states of one group.

Every kernel factors as W = phi_out(Q_out) · M · phi_in(Q_in)^T, so a member's y = x W^T is computed in two
small products and W is never formed:

    signal = encode(x) = x · phi_in(Q_in) · M        what the group broadcasts, computed once
    y      = read(signal) = signal · phi_out(Q_out)^T        one per member

M acts when the signal is made, and only there: a group whose members read one input pays for it once.

Products take the type of x and accumulate in float32 at least.

Shape suffixes: I inputs of a member, J outputs of a member, R rank, S signal width (R, or the lifted
features).
"""

from __future__ import annotations

import difflib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel, count_parameters, logical_axes
from ngc_jax.groups.states import States, fixed_lift, from_bilinear, init_states

__all__ = [
    "Kernel",
    "States",
    "count_parameters",
    "encode",
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

# The metric's diagonal stays within exp(±40), about 4e-18 to 2e17: positive and finite in every floating
# type.
_LOG_LIMIT = 40.0


def encode(kernel: Kernel, states: States, x: Float[Array, "*batch i"]) -> Float[Array, "*batch s"]:
    """The signal that a group broadcasts for an input: x · phi_in · M.

    Args:
        kernel: The group's kernel.
        states: The group's states.
        x: Activations (..., I). A member of fewer inputs than the group has reads the first I input states,
            which is what padding x with zeros would give.

    Returns:
        The signal (..., S), of x's type.

    Raises:
        UsageError: If x is wider than the group's input states.
    """
    signal = _product("...i,is->...s", x, input_features(kernel, states, x.shape[-1]))
    return _apply_interaction(kernel, states, signal).astype(x.dtype)


def read(kernel: Kernel, states: States, member: str, signal: Float[Array, "*batch s"]) -> Float[Array, "*batch j"]:
    """What one member makes of its group's signal: signal · phi_out^T.

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
    return _product("...s,js->...j", signal, output_features(kernel, states, member)).astype(signal.dtype)


def forward(kernel: Kernel, states: States, member: str, x: Float[Array, "*batch i"]) -> Float[Array, "*batch j"]:
    """Compute y = x W^T of one member, without forming W: `read` of `encode`.

    Raises:
        UsageError: As `encode` and `read`.
    """
    return read(kernel, states, member, encode(kernel, states, x))


def weights(kernel: Kernel, states: States, member: str, d_in: int | None = None) -> Float[Array, "j i"]:
    """The member's weight matrix, formed: for tests, export and study.

    Args:
        kernel: The group's kernel.
        states: The group's states.
        member: Block name.
        d_in: The member's inputs when fewer than the group's.

    Returns:
        W (J, I), in float32 at least, by products of full precision on every device.

    Raises:
        UsageError: If the group has no such member, or `d_in` exceeds the group's inputs.
    """
    phi_IxS = _accurate(input_features(kernel, states, d_in))
    phi_JxS = _accurate(output_features(kernel, states, member))
    with jax.default_matmul_precision("highest"):
        return phi_JxS @ _apply_interaction(kernel, states, phi_IxS).T


def input_features(kernel: Kernel, states: States, d_in: int | None = None) -> Float[Array, "i s"]:
    """phi_in of the first `d_in` input states (all when None).

    Raises:
        UsageError: If the group has fewer inputs.
    """
    q_IxR = states["input_states"]
    if d_in is not None and d_in > q_IxR.shape[0]:
        raise UsageError(f"input of width {d_in} for a group of {q_IxR.shape[0]} input states; expected at most that")
    return _features(kernel, states, q_IxR[:d_in])


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
    features = _features(kernel, states, members[member])
    if kernel.name != "lifted":
        return features
    return features * states["amplitude"][member].astype(features.dtype)[:, None]


def interaction(kernel: Kernel, states: States) -> Float[Array, "s s"]:
    """M as a matrix (S, S): the identity, the metric, or the gain's multiple of the identity; for study."""
    width = kernel.signal_width(states["input_states"].shape[1])
    with jax.default_matmul_precision("highest"):
        return _apply_interaction(kernel, states, jnp.eye(width, dtype=_accurate(states["input_states"]).dtype))


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
        # The constant keeps the gain near one, whatever the sizes: one learning rate then fits all
        # parameters.
        d_in = states["input_states"].shape[0]
        return signal * (states["gain"].astype(signal.dtype) * (d_in * kernel.lift) ** -0.5)
    return signal


def _product(spec: str, x: Array, features: Array) -> Array:
    return jnp.einsum(spec, x, features.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _accurate(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
