"""Figures of conversion: statistics and fit of one layer, and large linear algebra on the device against the host's.

Legend: I width of a symmetric matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from experiments.accelerator_check.random_models import memory, random_model, random_tokens
from experiments.accelerator_check.records import Values
from experiments.accelerator_check.sizes import TOPOLOGY, Size, pruned_width
from ngc_jax.conversion.fitting import fit_group
from ngc_jax.conversion.output_gradients import measure_output_gradients
from ngc_jax.conversion.passes.factorise import factorise
from ngc_jax.conversion.pruning import nystrom_reconstruct, select_neurons
from ngc_jax.conversion.state import Calibration
from ngc_jax.conversion.statistics import Statistics, calibrate
from ngc_jax.models.config import block_name
from ngc_jax.models.load import kernel_of
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import uniform_rank

Wanted = Callable[[str], bool]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, its arrays included."""
    began = time.perf_counter()
    found = jax.block_until_ready(run())
    return time.perf_counter() - began, found


def one_layer(size: Size, wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """Seconds to measure the statistics of one layer, to fit each of its blocks, and to prune its MLP.

    Each measurement runs twice, and the second run counts: the first compiles.
    """
    model = random_model(size.layer, "bfloat16")
    config = model.config
    calibration = Calibration(random_tokens(size.tokens, config.vocab_size), window=size.window)

    def inputs() -> dict[str, Statistics]:
        return next(iter(calibrate(model, calibration)))[1]

    def gradients() -> Any:
        return measure_output_gradients(model, calibration)[0]

    first, _ = timed(inputs)
    seconds, measured = timed(inputs)
    values = {"seconds": seconds, "tokens/s": size.tokens / seconds, "first run (s)": first, **memory()}
    if wanted("input statistics"):
        yield "input statistics", values
    method = factorise("ngc_inputs", topology=TOPOLOGY, gauge=True)
    groups = all_candidates(candidate_cells(config, TOPOLOGY))
    for group in sorted(groups, key=lambda group: max(group.outputs, group.inputs)):
        (member,) = group.members
        row = f"fit {member.name.rpartition('.')[2]} {member.d_out} x {member.d_in} (host)"
        if wanted(row):
            rank = uniform_rank(group.members, 0.6, gauge=True)
            run = partial(fit_group, group, method, model.params, [measured[member.name]], rank)
            yield row, {"seconds": timed(run)[0], "rank": rank}
    if wanted("output gradients"):
        first, _ = timed(gradients)
        seconds, _ = timed(gradients)
        yield "output gradients, with unembedding", {"seconds": seconds, "first run (s)": first, **memory()}
    row = f"prune {config.mlp_dim} neurons (host)"
    if wanted(row):
        name = block_name(0, "d")
        weight = np.asarray(kernel_of(model.params, name), np.float64)
        moment = measured[name].second_moment
        count = pruned_width(config, 0.6, size.multiple)

        def prune() -> Any:
            kept = select_neurons(weight.copy(), moment, count)
            return nystrom_reconstruct(weight, moment, kept)

        yield row, {"seconds": timed(prune)[0], "kept": count}


def second_moment(width: int) -> np.ndarray:
    """A symmetric positive matrix with the decaying spectrum of a real second moment, float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * width, width)) * np.arange(1, width + 1) ** -0.75
    mixed = x @ (rng.standard_normal((width, width)) / width**0.5)
    return mixed.T @ mixed / len(x)


def refine_eigenvectors(matrix: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of Ogita and Aishima (2018, algorithm 1): squares the error of approximate eigenvectors.

    Args:
        matrix: Symmetric (I, I), in the type of the result.
        vectors: (I, I), approximate eigenvectors in columns.

    Returns:
        Eigenvalues (I,) and eigenvectors.
    """
    product = partial(jnp.matmul, precision="highest")
    left = jnp.eye(len(matrix), dtype=matrix.dtype) - product(vectors.T, vectors)
    projected = product(vectors.T, product(matrix, vectors))
    values = jnp.diag(projected) / (1 - jnp.diag(left))
    off_diagonal = projected - jnp.diag(values)
    # Frobenius norms bound the algorithm's spectral ones.
    threshold = 2 * (jnp.linalg.norm(off_diagonal) + jnp.linalg.norm(values) * jnp.linalg.norm(left))
    gaps = values[None, :] - values[:, None]
    apart = jnp.abs(gaps) > threshold / len(matrix)
    correction = jnp.where(apart, (projected + values[None, :] * left) / jnp.where(apart, gaps, 1), left / 2)
    return values, vectors + product(vectors, correction)


def solve_refined(matrix: jax.Array, right: jax.Array, factor: jax.Array, steps: int = 3) -> jax.Array:
    """Solve by a Cholesky factor of lower precision, with iterative refinement in the precision of `matrix`."""
    solve = partial(jax.scipy.linalg.cho_solve, (factor, True))
    x = solve(right.astype(factor.dtype)).astype(matrix.dtype)
    for _ in range(steps):
        residual = right - jnp.matmul(matrix, x, precision="highest")
        x = x + solve(residual.astype(factor.dtype)).astype(matrix.dtype)
    return x


def large_matrices(size: Size, wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """Eigenvectors and Cholesky solutions of one matrix: the host in float64, the device in float32, refined, float64.

    Errors are relative: of eigenpairs ||A V - V diag(values)|| / ||A||, of solutions ||A x - b|| / ||b||, both
    evaluated on the host in float64.
    """
    host = second_moment(size.matrix)
    host += 1e-4 * np.trace(host) / len(host) * np.eye(len(host))
    right = np.random.default_rng(1).standard_normal((len(host), 64))

    def pairs_error(values: Any, vectors: Any) -> float:
        w, v = np.asarray(values, np.float64), np.asarray(vectors, np.float64)
        return float(np.linalg.norm(host @ v - v * w) / np.linalg.norm(host))

    def solution_error(x: Any) -> float:
        return float(np.linalg.norm(host @ np.asarray(x, np.float64) - right) / np.linalg.norm(right))

    def rows(name: str, matrix: jax.Array, b: jax.Array, wide: tuple[jax.Array, jax.Array] | None) -> Any:
        """Both factorisations in the type of `matrix`; refined in that of `wide`."""
        eigh, cholesky = jax.jit(jnp.linalg.eigh), jax.jit(jnp.linalg.cholesky)
        refine, solve = jax.jit(refine_eigenvectors), jax.jit(solve_refined, static_argnames="steps")
        timed(lambda: cholesky(matrix))
        seconds, factor = timed(lambda: cholesky(matrix))
        yield f"cholesky, {name}", {"seconds": seconds, "error": solution_error(solve(matrix, b, factor, steps=0))}
        if wide is not None:
            timed(lambda: solve(*wide, factor))
            seconds, x = timed(lambda: solve(*wide, factor))
            yield f"refined solution, {name}", {"seconds": seconds, "error": solution_error(x)}
        timed(lambda: eigh(matrix))
        seconds, found = timed(lambda: eigh(matrix))
        yield f"eigh, {name}", {"seconds": seconds, "error": pairs_error(*found)}
        if wide is not None:
            vectors = found[1].astype(wide[0].dtype)
            timed(lambda: refine(wide[0], vectors))
            seconds, found = timed(lambda: refine(wide[0], vectors))
            yield f"refined eigenvectors, {name}", {"seconds": seconds, "error": pairs_error(*found)}

    single, right_32 = jnp.asarray(host, jnp.float32), jnp.asarray(right, jnp.float32)
    yield from rows("device float32", single, right_32, (single, right_32))
    seconds, factor = timed(lambda: scipy.linalg.cho_factor(host, lower=True))
    x = scipy.linalg.cho_solve(factor, right)
    yield "cholesky, host float64", {"seconds": seconds, "error": solution_error(x)}
    seconds, found = timed(lambda: scipy.linalg.eigh(host, driver="evd"))
    yield "eigh, host float64", {"seconds": seconds, "error": pairs_error(*found)}
    with jax.enable_x64(True):
        double, right_64 = jnp.asarray(host), jnp.asarray(right)
        for name, values in rows("device float32, float64 refinement", single, right_32, (double, right_64)):
            if name.startswith("refined"):
                yield name, values
        yield from rows("device float64", double, right_64, None)
