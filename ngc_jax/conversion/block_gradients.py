"""Sums over the gradients by a block's outputs, of one block or of one expert's.

Legend: T tokens, M outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ngc_jax.conversion.symmetric_sums import gram


def add_tokens(
    sums: Mapping[str, Any], kernel_MxI: Array, teacher_MxI: Array | None, x_TxI: Array, g_TxM: Array, full: bool
) -> dict[str, Any]:
    """Add the tokens of a batch to a block's sums; padded tokens have no gradient.

    With None for the teacher's kernel, where it is the block's own, XLA computes W^T g in the backward pass.
    """
    teacher_MxI = kernel_MxI if teacher_MxI is None else teacher_MxI
    x_TxI, g_TxM = x_TxI.astype(jnp.float32), g_TxM.astype(jnp.float32)
    new: dict[str, Any] = {"mean_square": sums["mean_square"] + jnp.square(g_TxM).sum(axis=0)}
    kernel_MxI, teacher_MxI = kernel_MxI.astype(jnp.float32), teacher_MxI.astype(jnp.float32)
    if "second_moment" in sums:
        d_out, d_in = teacher_MxI.shape
        products = gram(g_TxM if full or d_out <= d_in else g_TxM @ teacher_MxI)
        new["second_moment"] = jax.tree.map(jnp.add, sums["second_moment"], products)
    if "slope" in sums:
        # The difference of the weights, not of two products, which may have low precision.
        new["slope"] = sums["slope"] + jnp.vdot(g_TxM, x_TxI @ (kernel_MxI - teacher_MxI).T)
    return new
