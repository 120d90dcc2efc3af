"""How the blocks that read one input are multiplied at run time, in a decoder whose weights were joined.

The parameters of a trained or converted model are stored per block and per group. To run it fast, the matrices that
read the same numbers are joined into one product (`Site`); see `inference.for_inference`. The same function, up to
rounding.

Legend: I inputs, J outputs of all blocks, S signal width, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.groups.gauge import other_neurons
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig

SITES = {"attn": ("qkv", "o"), "mlp": ("ug", "d")}
"""Roles that read one input together, by part of a layer; those that a decoder lacks are left out."""

# A further product in a step costs as much as reading this number of weights does.
_PRODUCT = 1 << 14
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A group as one site reads it.

    Attributes:
        group: Its name.
        roles: Its members at the site.
        width: S, of its signal.
        pivots: Input neurons whose inputs are gathered as the signal's first summand; None if all input states, those
            of pivots among them, are part of the joined product.
    """

    group: str
    roles: str
    width: int
    pivots: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Site:
    """The blocks of one layer that read one input.

    Attributes:
        roles: In the order of their outputs.
        d_in: I.
        d_outs: Outputs of each role.
        bias: Whether the blocks have biases.
        dense: Roles that the joined product computes directly: blocks without a group, and those whose factors would
            take longer than their weights.
        readings: The groups of all others.
    """

    roles: str
    d_in: int
    d_outs: tuple[int, ...]
    bias: bool
    dense: str
    readings: tuple[Reading, ...]

    def size(self, roles: str) -> int:
        """Outputs of some of its roles."""
        return sum(self.d_outs[self.roles.index(role)] for role in roles)


@lru_cache(maxsize=4096)
def site_of(config: DecoderConfig, plan: Plan, layer: int, roles: str) -> Site:
    """The site at which some roles of a layer read; decides for each group what is fastest at run time.

    Args:
        config: The decoder.
        plan: Its groups.
        layer: From 0.
        roles: One of those in `SITES`.
    """
    blocks = [config.block(layer, role) for role in roles]
    members: dict[GroupPlan | None, str] = {}
    for role, block in zip(roles, blocks, strict=True):
        group = plan.group_of.get(block.name)
        members[group] = members.get(group, "") + role
    dense, readings = members.pop(None, ""), []
    site = Site(roles, blocks[0].d_in, tuple(block.d_out for block in blocks), any(b.bias for b in blocks), "", ())
    for group, its in members.items():
        assert group is not None
        reading = _fastest(group, its, site.d_in, site.size(its))
        if reading is None:
            dense += its
        else:
            readings.append(reading)
    # In the order of outputs: neighbours in the product are then neighbours in what follows.
    dense = "".join(role for role in roles if role in dense)
    return dataclasses.replace(site, dense=dense, readings=tuple(readings))


def _fastest(group: GroupPlan, roles: str, d_in: int, d_out: int) -> Reading | None:
    """The form in which a group takes least time, by the numbers that it reads; None for dense weights."""
    width = group.kernel.signal_width(group.rank)
    pivots = () if group.pivots is None else tuple(pivot for pivot in group.pivots if pivot < d_in)
    joined = width * (d_in + d_out) + _PRODUCT
    gathered = joined - width * len(pivots) + _PRODUCT
    if d_in * d_out <= min(joined, gathered) or len(pivots) == d_in:
        return None
    return Reading(group.name, roles, width, pivots if pivots and gathered < joined else None)


class JoinedProjection(nn.Module):
    """All blocks of a site.

    Attributes:
        site: What it computes, and how.
        param_dtype: Of parameters and activations.
    """

    site: Site
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> list[Array]:
        """Map x (..., I) to the outputs of every role, (..., J) each."""
        site = self.site
        joined = [reading for reading in site.readings if reading.pivots is None]
        widths = [site.size(role) for role in site.dense] + [reading.width for reading in joined]
        found: dict[str, Array] = {}
        if widths:
            y = product(x, self._weight("kernel", site.d_in, sum(widths)))
            parts = split(y, widths)
            found.update(zip(site.dense, parts, strict=False))
            signals = dict(zip((reading.group for reading in joined), parts[len(site.dense) :], strict=True))
        else:
            signals = {}
        for reading in site.readings:
            signal = signals.get(reading.group)
            if signal is None:
                signal = self._gathered(reading, x)
            outputs = product(signal, self._weight(f"read_{reading.roles}", reading.width, site.size(reading.roles)))
            found.update(zip(reading.roles, split(outputs, [site.size(role) for role in reading.roles]), strict=True))
        if site.bias:
            bias = self.param("bias", nn.initializers.zeros, (sum(site.d_outs),), self.param_dtype)
            biases = dict(zip(site.roles, split(bias, list(site.d_outs)), strict=True))
            found = {role: y + biases[role] for role, y in found.items()}
        return [found[role] for role in site.roles]

    def _gathered(self, reading: Reading, x: Array) -> Array:
        """The signal of a group in the fixed gauge: its pivots' inputs, and the product of the others."""
        pivots = np.asarray(reading.pivots)
        others = other_neurons(reading.pivots or (), x.shape[-1])
        rest = product(_take(x, others), self._weight(f"rest_{reading.roles}", len(others), reading.width))
        own = _take(x, pivots)
        return rest + jnp.pad(own, [(0, 0)] * (x.ndim - 1) + [(0, reading.width - len(pivots))])

    def _weight(self, name: str, d_in: int, d_out: int) -> Array:
        weight: Array = self.param(name, _init, (d_in, d_out), self.param_dtype)
        return weight


def product(
    x: Float[Array, "... I"], weight_IxJ: Float[Array, "I J"], dtype: jnp.dtype | None = None
) -> Float[Array, "... J"]:
    """Multiply x · weight, accumulated in float32; of x's type unless another is given.

    Weights are (in, out): XLA's CPU compiler multiplies few rows by them up to twice as fast as by (out, in).
    """
    rows = math.prod(x.shape[:-1])
    # For a single row, XLA's CPU compiler would write all weights out in float32 before it multiplies them.
    alone = rows == 1 and x.dtype.itemsize < 4
    x_RxI = jnp.concatenate([x.reshape(1, -1)] * 2) if alone else x.reshape(rows, -1)
    y_RxJ = jnp.dot(x_RxI, weight_IxJ, preferred_element_type=jnp.float32).astype(dtype or x.dtype)
    return y_RxJ[:rows].reshape(*x.shape[:-1], weight_IxJ.shape[1])


def split(y: Float[Array, "... J"], widths: list[int]) -> list[Array]:
    """Consecutive parts of the last axis."""
    return [y] if len(widths) == 1 else jnp.split(y, np.cumsum(widths)[:-1].tolist(), axis=-1)


def take_columns(table_DxV: Float[Array, "D V"], indices: Int[Array, " *batch"]) -> Float[Array, "... D"]:
    """Columns of a matrix; NaN for an index out of range."""
    if table_DxV.dtype.itemsize != 2:
        return jnp.moveaxis(jnp.take(table_DxV, indices, axis=1), 0, -1)
    # As bits: XLA's CPU compiler would convert the whole matrix to float32 before it looks up a column. All ones: NaN.
    bits = jnp.take(jax.lax.bitcast_convert_type(table_DxV, jnp.uint16), indices, axis=1, fill_value=0xFFFF)
    return jnp.moveaxis(jax.lax.bitcast_convert_type(bits, table_DxV.dtype), 0, -1)


def _take(x: Array, indices: np.ndarray) -> Array:
    return x.at[..., indices].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
