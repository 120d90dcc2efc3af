"""Linen modules that own the neuron states; the computations are in `ngc_jax.groups.kernels`.

The parameter tree of `Groups(plan, name="groups")` is that of `states.py`, one entry per group:

    params["groups"][group]["input_states"]              (D_in, R); (D_in - R, R) in the fixed gauge
    params["groups"][group]["output_states"][block]      (D_out, R)
    params["groups"][group]["metric" | "gain" | ...]     the kernel's own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.core
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ngc_jax.groups import kernels
from ngc_jax.groups.kernel_spec import Kernel, logical_axes
from ngc_jax.groups.plan import Plan
from ngc_jax.groups.quantised import stored_parameter
from ngc_jax.groups.states import initialisers

__all__ = ["Group", "Groups", "logical_axes"]


class Group(nn.Module):
    """The states of one neuronal group.

    Attributes:
        kernel: The group's interaction kernel.
        rank: Dimension of a neuron state.
        d_in: Rows of the input states: the widest member's inputs.
        d_outs: Output neurons of every member: a mapping by block name, or pairs.
        param_dtype: Type of the stored numbers.
        pivots: The input neurons whose states are unit vectors and not stored; None for none.

    Raises:
        UsageError: When bound, if a size is not positive, the kernel does not admit the rank or the pivots do not fit.
    """

    kernel: Kernel
    rank: int
    d_in: int
    d_outs: Mapping[str, int] | tuple[tuple[str, int], ...]
    param_dtype: Any = jnp.float32
    pivots: Sequence[int] | None = None

    def setup(self) -> None:
        """Declare the parameters, one entry for each of the states'."""
        d_outs = dict(self.d_outs)
        parts = initialisers(self.kernel, self.rank, self.d_in, d_outs, self.param_dtype, pivots=self._pivots())
        self._states = {name: stored_parameter(self, name, init) for name, init in parts.items()}

    def __call__(self) -> dict[str, Any]:
        """The states as a plain pytree, for the pure functions of `kernels`."""
        # Linen freezes nested parameters and attributes; a frozen mapping is a different pytree than a dict.
        return {
            name: flax.core.unfreeze(part) if isinstance(part, flax.core.FrozenDict) else part
            for name, part in self._states.items()
        }

    def encode(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch s"]:
        """The signal for activations x; see `kernels.encode`."""
        return kernels.encode(self.kernel, self(), x, pivots=self._pivots())

    def read(self, member: str, signal: Float[Array, "*batch s"]) -> Float[Array, "*batch j"]:
        """The outputs that a member computes from the signal; see `kernels.read`."""
        return kernels.read(self.kernel, self(), member, signal)

    def weights(self, member: str, d_in: int | None = None) -> Float[Array, "j i"]:
        """The member's weight matrix, formed; see `kernels.weights`."""
        return kernels.weights(self.kernel, self(), member, d_in, pivots=self._pivots())

    def _pivots(self) -> tuple[int, ...] | None:
        """The pivots as the pure functions take them; `Groups` gives them as an array."""
        return None if self.pivots is None else tuple(int(pivot) for pivot in self.pivots)


class Groups(nn.Module):
    """All groups of a plan, each once: the shared part of a compact model.

    Attributes:
        plan: The plan; this module ignores its dense blocks.
        param_dtype: Type of the stored numbers.
    """

    plan: Plan
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Any]]:
        """The states of every group, by group name."""
        return {
            group.name: Group(
                kernel=group.kernel,
                rank=group.rank,
                d_in=group.d_in,
                d_outs=tuple(group.d_outs.items()),
                param_dtype=self.param_dtype,
                # An array: of a tuple linen visits every element, several times for each module, which took three
                # quarters of the time to trace a large model.
                pivots=None if group.pivots is None else cast(Sequence[int], np.asarray(group.pivots)),
                name=group.name,
            )()
            for group in self.plan.groups
        }
