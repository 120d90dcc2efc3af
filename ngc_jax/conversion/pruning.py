"""Neuron pruning: remove hidden neurons of MLPs and reconstruct their contribution from the kept ones.

A low rank treats all neurons alike, but hidden neurons differ in importance, and most of them are close to linear
combinations of the others. A layer's MLP with inputs h of its d block (F hidden neurons) keeps the set S:

    W_d h  ~  W' h_S,    W' = W_d C[:, S] C[S, S]^-1,    C = E[h h^T],

the best linear estimate (Nystrom; for C alone MoDeGPT, arXiv 2408.09632, section 3.2). Neurons are pruned one at a
time, always the one whose removal raises the loss least, with G the second moment of the loss's gradient with respect
to the block's outputs:

    || G^(1/2) w'_j ||^2 / [C[S, S]^-1]_jj

(optimal brain surgeon, Hassibi and Stork 1993, eq. 5, in the geometry of `best_states`). Every layer keeps the same
number, so that the result is a dense model of the same architecture, which is then factorised as any other.

Legend: F hidden neurons, S kept ones, I residual width, B neurons pruned between two updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from ngc_jax.conversion.closed_form import mean_diagonal, output_metric, pulled_metric, square_root
from ngc_jax.conversion.statistics import FirstTokens, OutputGradients, Statistics
from ngc_jax.conversion.thread_map import thread_map
from ngc_jax.errors import UsageError
from ngc_jax.host_memory import handed_over
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.families import family_of
from ngc_jax.models.load import LanguageModel
from ngc_jax.planning.widths import hidden_width
from ngc_jax.types import Params

# Blocks whose outputs are hidden neurons: their G must be measured whole.
PRUNED_ROLES = "ug"
# Neurons pruned before both matrices are updated as a whole, by one product.
_BLOCK = 64
# Relative to the mean diagonal of C: neurons that are silent on the calibration text are pruned first, without a
# division by zero.
_RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A dense model without its pruned hidden neurons.

    Attributes:
        model: The pruned dense model. Its layers replace the original ones only as `statistics` are read.
        kept: By layer, the kept hidden neurons of the dense model, ascending (S,); filled in the same way.
        statistics: Of the pruned model's blocks, layer by layer, derived from the dense model's.
    """

    model: LanguageModel
    kept: dict[int, Int[np.ndarray, " S"]]
    statistics: Iterator[dict[str, Statistics]]


def prune_layers(
    model: LanguageModel,
    config: DecoderConfig,
    stream: Iterable[Mapping[str, Statistics]],
    *,
    shrinkage: float = 0.0,
    at_once: int = 1,
    donate: bool = False,
) -> Pruned:
    """Prune the MLPs of a dense model, one layer after the other.

    Args:
        model: The dense model.
        config: The pruned model's, from `plan_pruning`.
        stream: Statistics of the dense model's blocks, layer by layer; gradients, if they have any, of u and g whole.
        shrinkage: Of C, as for `shrunk`.
        at_once: Number of layers that are pruned in parallel, and held.
        donate: Delete the dense kernels that pruned ones replace.
    """
    layers = dict(model.params["layers"])
    entry = family_of(config.architecture).width if config.causal else "intermediate_size"
    hf_config = {**model.hf_config, entry: hidden_width(config)}
    smaller = dataclasses.replace(model, config=config, hf_config=hf_config, params={**model.params, "layers": layers})
    kept: dict[int, np.ndarray] = {}

    waiting: dict[int, Mapping[str, Statistics]] = {}

    def run(layer: int) -> tuple[np.ndarray, Params, dict[str, Statistics]]:
        found = dict(waiting.pop(layer))
        if config.is_sparse(layer):
            return _prune_experts(layers[str(layer)], layer, found, config, shrinkage)
        if config.experts is not None:  # the dense MLPs beside experts are left as they are
            return np.arange(config.mlp_dim), layers[str(layer)], _as_measured(found, layers[str(layer)], layer)
        return _prune_layer(layers[str(layer)], layer, found, config, shrinkage)

    def each() -> Iterator[dict[str, Statistics]]:
        source, size = iter(stream), hidden_width(model.config)
        for first in range(0, config.num_layers, at_once):
            some = range(first, min(first + at_once, config.num_layers))
            waiting.update(zip(some, source, strict=False))
            done = thread_map(run, some, costs=[1.0] * len(some), widths=[size] * len(some))
            for layer, (kept[layer], layers[str(layer)], found) in zip(some, done, strict=True):
                if donate and (config.experts is None or config.is_sparse(layer)):
                    for role in config.mlp_roles:
                        model.params["layers"][str(layer)]["mlp"][role]["kernel"].delete()
                yield handed_over(found)

    return Pruned(smaller, kept, each())


def _prune_layer(
    params: Params, layer: int, statistics: dict[str, Statistics], config: DecoderConfig, shrinkage: float
) -> tuple[np.ndarray, Params, dict[str, Statistics]]:
    names = {role: block_name(layer, role) for role in config.mlp_roles}
    before = {role: np.asarray(params["mlp"][role]["kernel"]) for role in names}
    for role, name in names.items():
        entry = statistics[name]
        measured = [entry.second_moment] if role == "d" else []
        if not all(np.isfinite(array).all() for array in [before[role], *measured, *_measured(entry.gradients)]):
            raise UsageError(f"the weights or statistics of {name} are not finite; load the model with --dtype float32")
    hidden = statistics[names["d"]]
    kernel = before["d"].astype(np.float64)
    kept = select_neurons(
        _pulled_root(kernel, hidden.gradients), hidden.second_moment, config.mlp_dim, shrinkage=shrinkage
    )
    pruned_roles = [role for role in PRUNED_ROLES if role in names]
    small = {role: before[role][kept] for role in pruned_roles}
    small["d"] = nystrom_reconstruct(kernel, hidden.second_moment, kept, shrinkage=shrinkage)
    del before, kernel
    mlp = {role: {**params["mlp"][role], "kernel": _like(params["mlp"][role]["kernel"], small[role])} for role in small}
    for role in pruned_roles:
        if "bias" in mlp[role]:
            mlp[role]["bias"] = _like(mlp[role]["bias"], np.asarray(mlp[role]["bias"])[kept])
        statistics[names[role]] = _of_outputs(statistics[names[role]], kept, small[role])
    statistics[names["d"]] = _of_inputs(hidden, kept, small["d"], shrinkage)
    return kept, {**params, "mlp": mlp}, statistics


def _as_measured(statistics: dict[str, Statistics], params: Params, layer: int) -> dict[str, Statistics]:
    """The statistics of a layer that is not pruned, with W^T G W in place of G as after pruning."""
    for role in PRUNED_ROLES:
        entry = statistics.get(name := block_name(layer, role))
        if entry is not None and entry.gradients is not None:
            kernel = np.asarray(params["mlp"][role]["kernel"], np.float64)
            statistics[name] = dataclasses.replace(entry, gradients=_pulled(entry.gradients, kernel))
    return statistics


def _prune_experts(
    params: Params, layer: int, statistics: dict[str, Statistics], config: DecoderConfig, shrinkage: float
) -> tuple[np.ndarray, Params, dict[str, Statistics]]:
    """As `_prune_layer`, expert by expert; kept neurons are (E, S)."""
    assert config.experts is not None
    stacks = {role: params["mlp"][role]["kernel"] for role in config.mlp_roles}
    small = dataclasses.replace(config, mlp_dim=config.experts.width)
    kept, pruned = [], []
    for expert in range(config.experts.count):
        # The expert by itself, as the MLP of a layer without others.
        own = {block_name(layer, role): statistics[block_name(layer, role, expert)] for role in config.mlp_roles}
        alone: Params = {"mlp": {role: {"kernel": stack[expert]} for role, stack in stacks.items()}}
        stay, alone, own = _prune_layer(alone, layer, own, small, shrinkage)
        kept.append(stay)
        pruned.append({role: np.asarray(alone["mlp"][role]["kernel"]) for role in stacks})
        statistics |= {block_name(layer, role, expert): own[block_name(layer, role)] for role in config.mlp_roles}
    mlp = {role: {"kernel": _like(stack, np.stack([one[role] for one in pruned]))} for role, stack in stacks.items()}
    return np.stack(kept), {**params, "mlp": {**params["mlp"], **mlp}}, statistics


def _measured(gradients: OutputGradients | None) -> list[np.ndarray]:
    if gradients is None:
        return []
    return [gradients.mean_square] + ([] if gradients.second_moment is None else [gradients.second_moment])


def _like(before: jax.Array, array: np.ndarray) -> jax.Array:
    """An array of the type and on the devices of another."""
    return jax.device_put(array.astype(before.dtype), before.sharding)


def _pulled_root(weight_MxF: np.ndarray, gradients: OutputGradients | None) -> np.ndarray:
    """A matrix (R, F) with R^T R = W^T (G + damping) W."""
    metric = output_metric(gradients, len(weight_MxF))
    if metric is None:
        return square_root(pulled_metric(weight_MxF, gradients)).T
    return np.sqrt(metric)[:, None] * weight_MxF if metric.ndim == 1 else square_root(metric).T @ weight_MxF


def select_neurons(
    root_RxF: Float[np.ndarray, "R F"],
    second_moment_FxF: Float[np.ndarray, "F F"],
    count: int,
    *,
    shrinkage: float = 0.0,
) -> Int[np.ndarray, " S"]:
    """Select the inputs of a block to keep, by pruning the others one by one, always the one that costs least.

    Exact: after each removal both matrices are those of the remaining inputs. A block of removals is accumulated and
    applied at once, since a product of matrices is much faster than the same number of vector products.

    Args:
        root_RxF: G^(1/2) W, or any matrix whose product with its transpose is W^T G W; overwritten.
        second_moment_FxF: C of the block's inputs; may be singular.
        count: Number of inputs to keep.
        shrinkage: Of C, as for `shrunk`.

    Returns:
        Their indices, ascending.
    """
    size = len(second_moment_FxF)
    # In place, in Fortran order: in a large model's layer this matrix is larger than all its weights.
    inverse_FxF, _ = scipy.linalg.lapack.dpotri(
        _cholesky(second_moment_FxF.copy(), shrinkage), lower=True, overwrite_c=True
    )
    _mirror_lower(inverse_FxF)
    weights_F = np.einsum("rf,rf->f", root_RxF, root_RxF)
    is_kept = np.ones(size, bool)
    while (left := int(is_kept.sum()) - count) > 0:
        block = min(left, _BLOCK)
        # inverse - p p^T and root - w c: p, w and c have a row for every pruned neuron.
        p_BxF, c_BxF, w_BxR = (np.zeros((block, width)) for width in (size, size, len(root_RxF)))
        inverse_F = np.diag(inverse_FxF).copy()
        weights_F[~is_kept], inverse_F[~is_kept] = np.inf, 1.0
        for row in range(block):
            pruned = int((weights_F / inverse_F).argmin())
            p_F = inverse_FxF[:, pruned] - p_BxF[:row, pruned] @ p_BxF[:row]
            w_R = root_RxF[:, pruned] - c_BxF[:row, pruned] @ w_BxR[:row]
            # The share of it that each neuron absorbs: w_i becomes w_i - c_i w.
            c_F = p_F / p_F[pruned]
            products_F = w_R @ root_RxF - (w_BxR[:row] @ w_R) @ c_BxF[:row]
            weights_F += c_F * (products_F[pruned] * c_F - 2 * products_F)
            p_BxF[row], c_BxF[row], w_BxR[row] = p_F / math.sqrt(p_F[pruned]), c_F, w_R
            inverse_F -= p_BxF[row] ** 2
            is_kept[pruned], weights_F[pruned], inverse_F[pruned] = False, np.inf, 1.0
        scipy.linalg.blas.dgemm(-1.0, p_BxF.T, p_BxF.T, 1.0, inverse_FxF, trans_b=True, overwrite_c=True)
        root_RxF -= w_BxR.T @ c_BxF
    return np.flatnonzero(is_kept)


def nystrom_reconstruct(
    weight_MxF: Float[np.ndarray, "M F"],
    second_moment_FxF: Float[np.ndarray, "F F"],
    kept: Int[np.ndarray, " S"],
    *,
    shrinkage: float = 0.0,
) -> Float[np.ndarray, "M S"]:
    """The weight matrix on the kept inputs that best reconstructs the block's output: W C[:, S] C[S, S]^-1."""
    # Kept inputs keep their own weights; only the pruned inputs' contribution is reconstructed.
    pruned = np.setdiff1d(np.arange(len(second_moment_FxF)), kept)
    across_MxS = (1 - shrinkage) * (weight_MxF[:, pruned] @ second_moment_FxF[np.ix_(pruned, kept)])
    factor_SxS = _cholesky(second_moment_FxF[np.ix_(kept, kept)], shrinkage)
    absorbed_SxM, _ = scipy.linalg.lapack.dpotrs(factor_SxS, across_MxS.T, lower=True, overwrite_b=True)
    del factor_SxS
    return weight_MxF[:, kept] + absorbed_SxM.T


def _cholesky(second_moment: np.ndarray, shrinkage: float) -> np.ndarray:
    """The lower factor of the shrunk C + ridge, in Fortran order; the elements above its diagonal are undefined.

    The given array is overwritten. Negative eigenvalues are raised to the ridge.
    """
    ridge = _RIDGE * mean_diagonal(second_moment)
    diagonal = np.diag(second_moment) + ridge
    matrix = second_moment.T  # it is symmetric
    matrix *= 1 - shrinkage
    np.fill_diagonal(matrix, diagonal)
    factor, failed = scipy.linalg.lapack.dpotrf(matrix, lower=True, clean=False, overwrite_a=True)
    if failed:  # the part above the diagonal is unchanged
        np.fill_diagonal(factor, diagonal)
        values, vectors = scipy.linalg.eigh(factor, lower=False)
        clipped = np.asfortranarray((vectors * np.maximum(values, ridge)) @ vectors.T)
        factor, _ = scipy.linalg.lapack.dpotrf(clipped, lower=True, clean=False, overwrite_a=True)
    return np.asarray(factor)


def _mirror_lower(matrix: np.ndarray, rows: int = 512) -> None:
    """Make a matrix symmetric from its lower part, in place, one band of rows at a time."""
    for start in range(0, len(matrix), rows):
        end = start + rows
        matrix[start:end, end:] = matrix[end:, start:end].T
        corner = matrix[start:end, start:end]
        corner += np.tril(corner, -1).T - np.triu(corner, 1)


def _of_outputs(entry: Statistics, kept: np.ndarray, kernel_SxI: np.ndarray) -> Statistics:
    """The statistics of a block with some outputs pruned; of the gradients only what a block of its shape needs."""
    gradients = entry.gradients
    if gradients is None:
        return entry
    second = gradients.second_moment
    if second is not None:
        # Of W^T G W nothing is left to use: the pruned outputs' part cannot be taken out.
        second = second[np.ix_(kept, kept)] if len(second) == len(gradients.mean_square) else None
    gradients = dataclasses.replace(gradients, mean_square=gradients.mean_square[kept], second_moment=second)
    return dataclasses.replace(entry, gradients=_pulled(gradients, kernel_SxI))


def _of_inputs(entry: Statistics, kept: np.ndarray, kernel_MxS: np.ndarray, shrinkage: float) -> Statistics:
    """The statistics of a block with some inputs pruned and reconstructed from the kept ones; outputs do not change."""
    both = np.ix_(kept, kept)
    gradients = entry.gradients
    if gradients is not None:
        second = gradients.second_moment
        if second is not None and len(second) != len(kernel_MxS):  # W^T G W was measured
            absorb_FxS = nystrom_reconstruct(np.eye(len(second)), entry.second_moment, kept, shrinkage=shrinkage)
            gradients = dataclasses.replace(gradients, second_moment=absorb_FxS.T @ second @ absorb_FxS)
        gradients = _pulled(gradients, kernel_MxS)
    return dataclasses.replace(
        entry,
        second_moment=entry.second_moment[both],
        absolute_mean=entry.absolute_mean[kept],
        fisher=None if entry.fisher is None else entry.fisher[kept],
        gradients=gradients,
        first=None if entry.first is None else FirstTokens(entry.first.count, entry.first.second_moment[both]),
    )


def _pulled(gradients: OutputGradients, kernel_MxI: np.ndarray) -> OutputGradients:
    """W^T G W in place of G for a block with more outputs than inputs, as gradients are measured."""
    second = gradients.second_moment
    if second is None or len(second) != len(kernel_MxI) or len(kernel_MxI) <= kernel_MxI.shape[1]:
        return gradients
    return dataclasses.replace(gradients, second_moment=kernel_MxI.T @ second @ kernel_MxI)
