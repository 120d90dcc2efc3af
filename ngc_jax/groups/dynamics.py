"""Communication dynamics: groups that drive one another by their signals, in rounds.

One round, for every group g, with signals s_g = encode(h_g) and transports T between the latent spaces:

    h_g  <-  h_g + dt · (-h_g + sigma(read_g(sum over g' of T_gg' s_g')) + u_g)

u is the potential, the external driving force. T_gg is intra-group communication, T_gg' between different groups is
inter-group communication. A round is one Euler step of dh/dt = -h + sigma(W h) + u, with W from `coupling`.

All groups here have the same size and are stacked: the states of one group are exactly those of `states.py`,
with one member called `MEMBER`, and every leaf has a leading axis G. Functions of one group are mapped over all of
them by `jax.vmap`. In the fixed gauge (`pivots`, see `gauge.py`) all groups have the same pivots, since the numbering
of neurons is arbitrary. Activations are (G, N); batches are a further vmap.

    params = {"states": {"input_states": (G, N, R), "output_states": {"self": (G, N, R)}, ...},
              "transport": (G, G, S, S)}

Shape suffixes: G groups (H senders), N neurons of a group, R rank, S signal width, T rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.kernels import encode, read
from ngc_jax.groups.states import init_states
from ngc_jax.types import Params

Activation: TypeAlias = Callable[[Array], Array]

# The name under which a group of the dynamics reads its own latent space.
MEMBER = "self"
_BILINEAR = Kernel()


def init_params(
    key: PRNGKeyArray,
    groups: int,
    neurons: int,
    rank: int,
    *,
    kernel: Kernel = _BILINEAR,
    strength: float = 1.0,
    dtype: Any = jnp.float32,
    pivots: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Draw groups with all-to-all communication.

    The transports have variance strength^2 / (groups · rank): when all activations have variance 1, the summed
    drive of a neuron has root mean square near `strength`.

    Args:
        key: Random key.
        groups: Number of groups G.
        neurons: Neurons N of a group.
        rank: Dimension of a neuron state.
        kernel: The groups' kernel.
        strength: Scale of the coupling; 0 uncouples the groups.
        dtype: Type of the parameters.
        pivots: Every group's pivots if the gauge is fixed.

    Returns:
        The parameters, as described at the top of this module.

    Raises:
        UsageError: If a size is not positive, the kernel does not admit the rank or the pivots do not fit.
    """
    if groups < 1:
        raise UsageError(f"the dynamics of {groups} groups; expected at least 1 group")
    states_key, transport_key = jax.random.split(key)

    def one_group(group_key: PRNGKeyArray) -> dict[str, Any]:
        return init_states(group_key, kernel, rank, neurons, {MEMBER: neurons}, dtype, pivots=pivots)

    width = kernel.signal_width(rank)
    transport_GxHxSxS = jax.random.normal(transport_key, (groups, groups, width, width), dtype)
    return {
        "states": jax.vmap(one_group)(jax.random.split(states_key, groups)),
        "transport": transport_GxHxSxS * jnp.asarray(strength * (groups * rank) ** -0.5, dtype),
    }


def signals(
    params: Params, h: Float[Array, "g n"], kernel: Kernel = _BILINEAR, *, pivots: Sequence[int] | None = None
) -> Float[Array, "g s"]:
    """The signal of every group: encode, mapped over the groups."""
    return jax.vmap(lambda states, h_N: encode(kernel, states, h_N, pivots=pivots))(params["states"], h)


def drive(
    params: Params, h: Float[Array, "g n"], kernel: Kernel = _BILINEAR, *, pivots: Sequence[int] | None = None
) -> Float[Array, "g n"]:
    """The input of every neuron from all signals, before the activation: W h, without forming W."""
    received_GxS = jnp.einsum("ghst,ht->gs", params["transport"], signals(params, h, kernel, pivots=pivots))
    return jax.vmap(lambda states, s_S: read(kernel, states, MEMBER, s_S))(params["states"], received_GxS)


def step(
    params: Params,
    h: Float[Array, "g n"],
    u: Float[Array, "g n"],
    *,
    dt: float,
    activation: Activation = jnp.tanh,
    kernel: Kernel = _BILINEAR,
    pivots: Sequence[int] | None = None,
) -> Float[Array, "g n"]:
    """One round of communication.

    Args:
        params: Parameters as from `init_params`.
        h: Activations (G, N).
        u: Potential (G, N); zeros for the undriven dynamics.
        dt: Time step, in units of the neurons' decay time; a stable Euler step of the decay needs dt < 2.
        activation: sigma, elementwise.
        kernel: The groups' kernel.
        pivots: Every group's pivots if the gauge is fixed.

    Returns:
        The activations (G, N) after the round.
    """
    return h + dt * (-h + activation(drive(params, h, kernel, pivots=pivots)) + u)


def unroll(
    params: Params,
    h0: Float[Array, "g n"],
    u: Float[Array, "t g n"],
    *,
    dt: float,
    activation: Activation = jnp.tanh,
    kernel: Kernel = _BILINEAR,
    pivots: Sequence[int] | None = None,
) -> Float[Array, "t g n"]:
    """The trajectory over one round for each potential.

    Args:
        params: Parameters as from `init_params`.
        h0: Activations (G, N) before the first round.
        u: Potential of every round (T, G, N).
        dt: Time step.
        activation: sigma, elementwise.
        kernel: The groups' kernel.
        pivots: Every group's pivots if the gauge is fixed.

    Returns:
        The activations (T, G, N) after each round; `h0` is not among them.
    """

    def round_(h: Array, u_GxN: Array) -> tuple[Array, Array]:
        h = step(params, h, u_GxN, dt=dt, activation=activation, kernel=kernel, pivots=pivots)
        return h, h

    return jax.lax.scan(round_, h0, u)[1]


def coupling(
    params: Params, kernel: Kernel = _BILINEAR, *, pivots: Sequence[int] | None = None
) -> Float[Array, "gn gn"]:
    """Form the weights W by which neurons act on neurons through all groups, for tests and study.

    Block (g, g') is phi_out_g · T_gg' · M phi_in_g'^T. The Jacobian of `step` is
    (1 - dt) I + dt · diag(sigma'(W h)) W. Where sigma's slope is at most 1 and W's largest singular value k is
    below 1, a round with dt <= 1 contracts the distance of two trajectories under one potential at least by the
    factor 1 - dt (1 - k).

    Returns:
        W (G N, G N), neurons ordered group by group.
    """
    groups, neurons = params["states"]["output_states"][MEMBER].shape[:2]
    identity = jnp.eye(groups * neurons, dtype=params["transport"].dtype)

    def column(h: Array) -> Array:
        return drive(params, h.reshape(groups, neurons), kernel, pivots=pivots).reshape(-1)

    with jax.default_matmul_precision("highest"):
        return jax.vmap(column, out_axes=1)(identity)


class Communication(nn.Module):
    """Communicating groups with their parameters.

    Attributes:
        groups: Number of groups G.
        neurons: Neurons N of a group.
        rank: Dimension of a neuron state.
        kernel: The groups' kernel.
        dt: Time step.
        activation: sigma, elementwise.
        strength: Scale of the coupling at initialisation.
        param_dtype: Type of the parameters.
        pivots: Every group's pivots if the gauge is fixed.
    """

    groups: int
    neurons: int
    rank: int
    kernel: Kernel = _BILINEAR
    dt: float = 0.1
    activation: Activation = jnp.tanh
    strength: float = 1.0
    param_dtype: Any = jnp.float32
    pivots: tuple[int, ...] | None = None

    def setup(self) -> None:
        """Declare the parameters."""

        def init(key: PRNGKeyArray, part: str) -> Any:
            return init_params(
                key,
                self.groups,
                self.neurons,
                self.rank,
                kernel=self.kernel,
                strength=self.strength,
                dtype=self.param_dtype,
                pivots=self.pivots,
            )[part]

        self._params = {part: self.param(part, init, part) for part in ("states", "transport")}

    def __call__(self, h: Float[Array, "g n"], u: Float[Array, "g n"]) -> Float[Array, "g n"]:
        """One round; see `step`."""
        return step(self._params, h, u, **self._law())

    def unroll(self, h0: Float[Array, "g n"], u: Float[Array, "t g n"]) -> Float[Array, "t g n"]:
        """Many rounds; see `unroll`."""
        return unroll(self._params, h0, u, **self._law())

    def _law(self) -> dict[str, Any]:
        return {"dt": self.dt, "activation": self.activation, "kernel": self.kernel, "pivots": self.pivots}
