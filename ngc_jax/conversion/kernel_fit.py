"""States of a kernel without closed form: gradient steps on a group's own loss, from the bilinear solution.

Each group is fitted alone to its members' dense weights, as the authors of NGC do layer by layer (arXiv 2510.16851), so
that no pass through the model is needed. The loss is the error of the members' outputs, weighted by each output's
influence on the model's loss where gradients were measured, and optionally the error of the weights:

    sum over m of  || G_m^(1/2) (W_m - What_m) C_m^(1/2) ||^2 / sum over m of || G_m^(1/2) W_m C_m^(1/2) ||^2
        + weight_share * sum over m of || W_m - What_m ||^2 / sum over m of || W_m ||^2

Legend: J outputs of a member, I its inputs, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ngc_jax.conversion.closed_form import DAMPING, Factors, output_metric, square_root
from ngc_jax.conversion.statistics import Statistics
from ngc_jax.groups.kernels import Kernel, from_bilinear, weights

# Initial root mean square of the lifted kernel's states: tanh is nonlinear there but not saturated. The weights start
# far from the bilinear ones, and end nearer to the dense ones than from a linear start (docs/measured.md).
START_SIZE = 1.0


def fit_kernel(
    kernel: Kernel,
    members: Sequence[str],
    dense: Sequence[np.ndarray],
    statistics: Sequence[Statistics],
    states: Factors,
    *,
    steps: int,
    learning_rate: float = 0.05,
    weight_share: float = 0.0,
) -> tuple[dict[str, Any], np.ndarray]:
    """Fit one group's states by Adam with a cosine schedule, in float32 on the default device.

    Args:
        kernel: Any kernel; its rank is that of `states`.
        members: Block names.
        dense: (J, I) weight of each member.
        statistics: Of each member; none for C = I and G = I.
        states: The bilinear solution at the same rank, in the free gauge.
        steps: Gradient steps; 0 returns the initial states.
        learning_rate: Peak learning rate, for states of root mean square 1; it is scaled down for smaller states.
        weight_share: Coefficient of the error of the weights.

    Returns:
        The states with the lowest loss, and the losses (steps + 1,).
    """
    started = from_bilinear(kernel, _balanced(members, states), START_SIZE)
    size = float(jnp.sqrt(jnp.square(started["input_states"]).mean()))
    measured: Sequence[Statistics | None] = statistics or [None] * len(dense)
    roots = [loss_roots(weight, entry) for weight, entry in zip(dense, measured, strict=True)]
    targets = [jnp.asarray(weight, jnp.float32) for weight in dense]
    fitted, losses = _descend(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), started),
        targets,
        roots,
        kernel=kernel,
        members=tuple(members),
        steps=steps,
        learning_rate=learning_rate * size,
        weight_share=weight_share,
    )
    return fitted, np.asarray(losses)


def local_loss(
    kernel: Kernel,
    members: Sequence[str],
    states: Mapping[str, Any],
    dense: Sequence[Float[Array, "J I"]],
    roots: Sequence[tuple[Array, Array]],
    weight_share: float = 0.0,
) -> Float[Array, ""]:
    """The loss at the top of this module, for states of any kernel.

    Args:
        kernel: The kernel.
        members: Block names.
        states: The group's states.
        dense: (J, I) weight of each member.
        roots: Of each member, K with K^T K = G, (J, J) or its diagonal (J,), and L with L L^T = C, (I, I).
        weight_share: Coefficient of the error of the weights.
    """
    output, scale, plain, size = (jnp.zeros(()) for _ in range(4))
    for name, weight, (k, l_IxI) in zip(members, dense, roots, strict=True):
        difference = weight - weights(kernel, states, name, weight.shape[1])

        def energy(matrix: Array, k: Array = k, l_IxI: Array = l_IxI) -> Array:
            left = k[:, None] * matrix if k.ndim == 1 else k @ matrix
            return jnp.square(left @ l_IxI).sum()

        output, scale = output + energy(difference), scale + energy(weight)
        plain, size = plain + jnp.square(difference).sum(), size + jnp.square(weight).sum()
    return output / scale + weight_share * plain / size


def loss_roots(weight: np.ndarray, statistics: Statistics | None) -> tuple[Array, Array]:
    """The factors that `local_loss` needs of a member: K^T K = G and L L^T = C, both damped as in `best_states`.

    Args:
        weight: (J, I).
        statistics: Of the member; None for C = I and G = I.

    Returns:
        K, (J, J), or (J,) where G is diagonal or only W^T G W was measured; and L, (I, I); float32.
    """
    outputs, inputs = weight.shape
    if statistics is None:
        return jnp.ones(outputs), jnp.eye(inputs)
    metric = output_metric(statistics.gradients, outputs)
    if metric is None:
        assert statistics.gradients is not None
        mean_square = statistics.gradients.mean_square
        metric = mean_square + DAMPING * mean_square.mean()
    k = np.sqrt(metric) if metric.ndim == 1 else square_root(metric).T
    return jnp.asarray(k, jnp.float32), jnp.asarray(square_root(statistics.second_moment), jnp.float32)


@functools.partial(jax.jit, static_argnames=("kernel", "members", "steps", "weight_share"))
def _descend(
    states: Any,
    dense: Sequence[Array],
    roots: Sequence[tuple[Array, Array]],
    *,
    kernel: Kernel,
    members: tuple[str, ...],
    steps: int,
    learning_rate: Array | float,
    weight_share: float,
) -> tuple[Any, Array]:
    optimizer = optax.adam(optax.cosine_decay_schedule(1.0, max(steps, 1)))

    def loss_of(states: Any) -> Array:
        return local_loss(kernel, members, states, dense, roots, weight_share)

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        states, moments, best, least = carry
        loss, gradient = jax.value_and_grad(loss_of)(states)
        better = loss < least
        best = jax.tree.map(lambda old, new: jnp.where(better, new, old), best, states)
        updates, moments = optimizer.update(gradient, moments)
        updates = jax.tree.map(lambda update: learning_rate * update, updates)
        return (optax.apply_updates(states, updates), moments, best, jnp.minimum(loss, least)), loss

    # The best states so far are kept, so that a step that raises the loss or diverges does no harm.
    carry = (states, optimizer.init(states), states, jnp.asarray(jnp.inf))
    (states, _, best, least), losses = jax.lax.scan(step, carry, length=steps)
    last = loss_of(states)
    best = jax.tree.map(lambda old, new: jnp.where(last < least, new, old), best, states)
    return best, jnp.append(losses, last)


def _balanced(members: Sequence[str], states: Factors) -> dict[str, Any]:
    """The same bilinear group with latent dimensions scaled equally on the input and the output side."""
    inputs = np.linalg.norm(states.input_states, axis=0)
    outputs = np.sqrt(sum(np.square(q).sum(axis=0) for q in states.output_states))
    scale = np.sqrt(np.maximum(outputs, 1e-30) / np.maximum(inputs, 1e-30))
    return {
        "input_states": jnp.asarray(states.input_states * scale, jnp.float32),
        "output_states": {
            name: jnp.asarray(q / scale, jnp.float32) for name, q in zip(members, states.output_states, strict=True)
        },
    }
