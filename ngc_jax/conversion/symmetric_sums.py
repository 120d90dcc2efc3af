"""Products of a matrix with its own transpose, of which only the upper part is computed, summed and stored.

Legend: T tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ngc_jax.models.layerwise import Compensated

# Most rows of a band. Lower bands compute less twice, higher ones multiply larger matrices.
_BAND = 384

# The upper part of a symmetric matrix: bands of rows, each from its first diagonal element to the last column.
Bands = tuple[Array, ...]


def _band_edges(width: int) -> list[int]:
    """The first row of every band and the end of the last; band heights differ by at most one."""
    count = -(-width // _BAND)
    size, larger = divmod(width, count)
    return [band * size + min(band, larger) for band in range(count + 1)]


def zero_bands(width: int) -> Bands:
    """A (D, D) matrix of zeros in float32."""
    edges = _band_edges(width)
    return tuple(jnp.zeros((end - start, width - start), jnp.float32) for start, end in itertools.pairwise(edges))


def gram(x_TxD: Float[Array, "T D"]) -> Bands:
    """x^T x in float32."""
    edges = _band_edges(x_TxD.shape[1])
    parts = [x_TxD[:, start:end] for start, end in itertools.pairwise(edges)]

    def product(left: Array, right: Array) -> Array:
        return jnp.einsum("ti,tj->ij", left, right, precision="highest", preferred_element_type=jnp.float32)

    # Each pair of bands separately: on a CPU one wide product takes a tenth longer.
    return tuple(
        jnp.concatenate([product(left, right) for right in parts[band:]], axis=1) for band, left in enumerate(parts)
    )


def whole(bands: Iterable[np.ndarray]) -> Float[np.ndarray, "D D"]:
    """The symmetric matrix in float64, on the host; bands are requested one at a time."""
    matrix, start = np.empty((0, 0)), 0
    for band in bands:
        if not len(matrix):
            matrix = np.empty((band.shape[1],) * 2)
        end = start + len(band)
        matrix[start:end, start:] = band
        matrix[end:, start:end] = matrix[start:end, end:].T
        corner = matrix[start:end, start:end]
        corner[:] = (corner + corner.T) / 2  # symmetric up to rounding
        start = end
    return matrix


def no_products(width: int) -> tuple[Compensated, ...]:
    """Second moments of no tokens."""
    return tuple(map(Compensated.zeros_like, zero_bands(width)))


def add_products(sums: tuple[Compensated, ...], x_TxD: Float[Array, "T D"]) -> tuple[Compensated, ...]:
    """Add x^T x."""
    return tuple(total.add(band) for total, band in zip(sums, gram(x_TxD), strict=True))


def mean_product(sums: tuple[Compensated, ...], count: int) -> Float[np.ndarray, "D D"]:
    """E[x x^T] over `count` tokens, in float64."""
    mean = whole(band.value() for band in sums)
    mean /= count
    return mean
