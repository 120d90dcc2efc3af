"""Neuron states: the parameters of one group as a plain pytree, and their initialisation.

    states = {"input_states": (D_in, R),                            (D_in - R, R) in the fixed gauge
              "output_states": {member: (D_out, R)},
              "metric": {"log_diagonal": (R,), "factor": (R, K)},   riemannian; factor only when metric_rank >
              0
              "gain": (), "amplitude": {member: (D_out,)},          lifted
              "lift": (R, S)}                                       lifted, when learned

Shape suffixes: R rank (dimension of a state), S lifted features, K metric rank, P probe neurons.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpy.typing import NDArray

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel, check_pivots, check_rank, metric_rank_at

States: TypeAlias = Mapping[str, Any]
Initialiser: TypeAlias = Callable[[PRNGKeyArray], Any]

# Neurons drawn on each side to measure the scale of freshly lifted weights (1 % accuracy; see `_gain_init`).
_PROBES = 512
# Share of the metric's identity that its low-rank part carries initially (see `_metric_init`). A power of
# 1/4 so that its square root is exact.
_FACTOR_SHARE = 0.25


def init_states(
    key: PRNGKeyArray,
    kernel: Kernel,
    rank: int,
    d_in: int,
    d_outs: Mapping[str, int],
    dtype: Any = jnp.float32,
    *,
    pivots: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Draw the states of a group so that signals keep their variance.

    For x of unit variance and width `d_in`, every member's y = x W^T has variance near 1, whatever the
    kernel. A member that reads only n of the `d_in` inputs starts with variance n / d_in; in the fixed gauge this
    requires evenly spread pivots.

    Args:
        key: Random key.
        kernel: The interaction kernel.
        rank: Dimension of a state.
        d_in: Rows of the input states: the widest member's inputs.
        d_outs: Output neurons of every member, by block name.
        dtype: Type of the stored numbers.
        pivots: The input neurons whose states are unit vectors and not stored (see `gauge.py`); None for none.

    Returns:
        The states, a nested dict of arrays as described at the top of this module.

    Raises:
        UsageError: If a size is not positive, the kernel does not admit the rank or the pivots do not fit.
    """
    parts = initialisers(kernel, rank, d_in, d_outs, dtype, pivots=pivots)
    keys = jax.random.split(key, len(parts))
    return {name: init(part) for (name, init), part in zip(parts.items(), keys, strict=True)}


def initialisers(
    kernel: Kernel,
    rank: int,
    d_in: int,
    d_outs: Mapping[str, int],
    dtype: Any = jnp.float32,
    *,
    pivots: Sequence[int] | None = None,
) -> dict[str, Initialiser]:
    """The initialiser of each entry of the states, a function of a key alone; arguments as for `init_states`.

    Raises:
        UsageError: If a size is not positive, the kernel does not admit the rank or the pivots do not fit.
    """
    check_rank(kernel, rank)
    if not d_outs:
        raise UsageError("a group has no members; name at least one block with its number of outputs")
    for name, size in {"the group's input": d_in, **d_outs}.items():
        if size < 1:
            raise UsageError(f"{name} has {size} neurons; expected at least 1")

    # The signal has unit variance per dimension: the input states divide by d_in, the output states by the
    # rank. The lifted kernel has its scale in the gain, and states of unit size so that tanh is nonlinear.
    std_in, std_out = (1.0, 1.0) if kernel.name == "lifted" else (d_in**-0.5, rank**-0.5)
    rows_in = d_in
    if pivots is not None:
        check_pivots(kernel, rank, d_in, pivots)
        rows_in = d_in - rank
        # A dimension of the signal is its pivot's input, of variance 1, plus the other neurons' share.
        std_out = (rank * (1 + rows_in / d_in)) ** -0.5

    def output_states(key: PRNGKeyArray) -> dict[str, Array]:
        keys = jax.random.split(key, len(d_outs))
        return {
            name: _normal(part, (d_out, rank), std_out, dtype)
            for (name, d_out), part in zip(sorted(d_outs.items()), keys, strict=True)
        }

    parts: dict[str, Initialiser] = {
        "input_states": lambda key: _normal(key, (rows_in, rank), std_in, dtype),
        "output_states": output_states,
    }
    if kernel.name == "riemannian":
        parts["metric"] = lambda _: _metric_init(kernel, rank, dtype)
    if kernel.name == "lifted":
        parts["gain"] = lambda key: _gain_init(key, kernel, rank, dtype)
        parts["amplitude"] = lambda _: {name: jnp.ones(d_out, dtype) for name, d_out in d_outs.items()}
        if kernel.learned:
            parts["lift"] = lambda _: jnp.asarray(fixed_lift(rank, kernel.lift, kernel.seed), dtype)
    return parts


def from_bilinear(kernel: Kernel, states: States, size: float = 1.0) -> dict[str, Any]:
    """Initialise the states of another kernel from a bilinear group, as the start of gradient steps.

    Riemannian: the same weights, M = I. Lifted: the states are scaled to root mean square `size` and the gain
    compensates. The weights tend to the bilinear ones as `size` goes to 0 (relative error about size^2);
    near 1 tanh is nonlinear, which a fit exploits.

    Args:
        kernel: The kernel to initialise.
        states: The states of a bilinear group in the free gauge (for a fixed one, see `gauge.free_gauge`).
        size: lifted: root mean square of the states' entries on either side.

    Returns:
        States of `kernel` with the shapes and types of the given ones.

    Raises:
        UsageError: If the kernel does not admit the rank, or `size` is not positive.
    """
    q_in, q_outs = states["input_states"], dict(states["output_states"])
    (d_in, rank), dtype = q_in.shape, q_in.dtype
    check_rank(kernel, rank)
    if size <= 0:
        raise UsageError(f"size is {size}; expected a positive root mean square of the states")
    if kernel.name != "lifted":
        metric = {"metric": _metric_init(kernel, rank, dtype)} if kernel.name == "riemannian" else {}
        return {"input_states": q_in, "output_states": q_outs, **metric}

    scale_in = _root_mean_square([q_in]) / size
    scale_out = _root_mean_square(list(q_outs.values())) / size
    gain = scale_in * scale_out * (rank / kernel.lift) * math.sqrt(d_in * kernel.lift)
    lifted = {
        "input_states": (q_in / scale_in).astype(dtype),
        "output_states": {name: (q / scale_out).astype(dtype) for name, q in q_outs.items()},
        "gain": gain.astype(dtype),
        "amplitude": {name: jnp.ones(q.shape[0], dtype) for name, q in q_outs.items()},
    }
    if kernel.learned:
        lifted["lift"] = jnp.asarray(fixed_lift(rank, kernel.lift, kernel.seed), dtype)
    return lifted


@functools.lru_cache(maxsize=64)
def fixed_lift(rank: int, lift: int, seed: int) -> NDArray[np.float64]:
    """The projection P of the lifted kernel: orthogonal rows, scaled so that Q P has entries as large as Q's.

    P P^T = (lift / rank) I, so small states make bilinear weights: tanh(Q P) tanh(K P)^T is then nearly
    (lift / rank) Q K^T. Drawn on the host by NumPy's frozen legacy generator, because a saved model contains only
    the seed: the same seed must give the same weights on another machine and under another version of JAX.

    Args:
        rank: Rows r.
        lift: Columns R, above r.
        seed: Seed of the draw.

    Returns:
        The (rank, lift) matrix, read-only.
    """
    draw = np.random.RandomState(seed).standard_normal((lift, rank))
    columns, triangle = np.linalg.qr(draw)
    # The factorisation is unique once the triangle's diagonal is positive; libraries differ in its sign.
    columns = columns * np.where(np.diag(triangle) < 0, -1.0, 1.0)
    projection = np.ascontiguousarray(columns.T * math.sqrt(lift / rank))
    projection.flags.writeable = False
    return projection


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: Any) -> Array:
    # Drawn in float32 at least, so that a bfloat16 model starts from the same numbers, rounded.
    return (std * jax.random.normal(key, shape, np.promote_types(dtype, np.float32))).astype(dtype)


def _root_mean_square(arrays: list[Array]) -> Array:
    """Over all entries of all arrays, in float32 at least; tiny instead of 0 for states that are all 0."""
    squares = [jnp.sum(jnp.square(a.astype(np.promote_types(a.dtype, np.float32)))) for a in arrays]
    return jnp.sqrt(jnp.maximum(sum(squares) / sum(a.size for a in arrays), 1e-30))


def _metric_init(kernel: Kernel, rank: int, dtype: Any) -> dict[str, Array]:
    """M = diag(exp(log_diagonal)) + factor factor^T, equal to I.

    A factor of zeros would stay zero: the gradient of F F^T vanishes at F = 0. The factor therefore starts as
    multiples of the first unit vectors, and the diagonal is reduced by their squares.
    """
    k = metric_rank_at(kernel, rank)
    shares = jnp.where(jnp.arange(rank) < k, math.log1p(-_FACTOR_SHARE), 0.0)
    metric = {"log_diagonal": shares.astype(dtype)}
    if k:
        metric["factor"] = math.sqrt(_FACTOR_SHARE) * jnp.eye(rank, k, dtype=dtype)
    return metric


def _gain_init(key: PRNGKeyArray, kernel: Kernel, rank: int, dtype: Any) -> Array:
    """The gain at which lifted weights have variance 1 / d_in, measured on probe neurons.

    The lifted features of a neuron are correlated (they come from fewer dimensions), and tanh has no closed
    form for their second moments; `_PROBES` squared sample weights estimate it to about a hundredth.
    """
    probes = jax.random.normal(key, (2, _PROBES, rank), jnp.float32)
    features_2xPxS = jnp.tanh(probes @ jnp.asarray(fixed_lift(rank, kernel.lift, kernel.seed), jnp.float32))
    weights_PxP = features_2xPxS[0] @ features_2xPxS[1].T
    return (math.sqrt(kernel.lift) / jnp.sqrt(jnp.mean(weights_PxP**2))).astype(dtype)
