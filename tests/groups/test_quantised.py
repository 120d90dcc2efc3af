"""Packed integer matrices, against bits and products computed by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.groups import kernels
from ngc_jax.groups.gauge import other_neurons
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.quantised import BITS, QuantisedMatrix, contract, pack, packed_length, unpack
from ngc_jax.groups.states import init_states


def made(bits, width, rows, size, affine=True, axis=1, seed=0):
    """A random quantised matrix, and the same in float64."""
    generator = np.random.default_rng(seed)
    groups = -(-width // size)
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (width, rows))
    scales, offsets = (generator.standard_normal((groups, rows)).astype(np.float16) for _ in range(2))
    whole = np.pad(codes, ((0, groups * size - width), (0, 0)))
    shape = (rows, width) if axis else (width, rows)
    matrix = QuantisedMatrix(pack(whole, bits), scales, offsets if affine else None, bits, size, shape, axis)
    exact = codes * np.repeat(scales.astype(float), size, axis=0)[:width]
    if affine:
        exact = exact + np.repeat(offsets.astype(float), size, axis=0)[:width]
    return matrix, exact.T if axis else exact


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_packed_from_the_lowest_bit_on(bits):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 3))
    packed = pack(codes, bits)
    assert packed.shape == (packed_length(24, bits), 3) == (24 * bits // 8, 3)
    for column in range(3):
        text = "".join(f"{byte:08b}"[::-1] for byte in packed[:, column].tolist())
        numbers = [int(text[k : k + bits][::-1], 2) for k in range(0, len(text), bits)]
        assert numbers == [code % 2**bits for code in codes[:, column].tolist()]
    parts = np.stack(unpack(jnp.asarray(packed), bits), axis=1).reshape(24, 3)
    np.testing.assert_array_equal(parts, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_products_are_those_of_the_matrix(bits, axis):
    matrix, exact = made(bits, width=37, rows=5, size=32, axis=axis)
    np.testing.assert_allclose(matrix.dequantise(), exact, rtol=1e-5, atol=1e-6)
    for tokens in (1, 3, 9):
        x = np.random.default_rng(tokens).standard_normal((tokens, 37)).astype(np.float32)
        expected = x @ (exact.T if axis else exact)
        np.testing.assert_allclose(jax.jit(contract, static_argnums=2)(x, matrix, axis), expected, rtol=1e-4, atol=1e-4)
        narrow = contract(x[:, :20], matrix, axis)
        np.testing.assert_allclose(narrow, x[:, :20] @ (exact.T if axis else exact)[:20], rtol=1e-4, atol=1e-4)


def test_products_of_bfloat16_accumulate_in_float32():
    matrix, exact = made(8, width=64, rows=5, size=32, affine=False)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64)), jnp.bfloat16)
    y = contract(x, matrix)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ exact.T, rtol=1e-4, atol=1e-2)


def test_matrices_map_over_an_axis_and_are_differentiable_by_inputs():
    several = [made(4, 40, 5, 32, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *(matrix for matrix, _ in several))
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    y = jax.vmap(contract)(x, stacked)
    np.testing.assert_allclose(y, [x[k] @ several[k][1].T for k in range(3)], rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: contract(x, several[0][0]).sum())(x[0])
    np.testing.assert_allclose(gradient, several[0][1].sum(axis=0), rtol=1e-4, atol=1e-4)


def test_rows_of_an_embedding_and_bytes():
    matrix, exact = made(4, width=33, rows=7, size=32)
    np.testing.assert_allclose(matrix.take(jnp.array([[6, 0, 2]])), exact[[[6, 0, 2]]], rtol=1e-5, atol=1e-6)
    assert matrix.size == 7 * 33
    assert matrix.nbytes == 7 * 17 + 2 * 2 * (7 * 2)  # 17 bytes of codes; two groups with scale and offset


@pytest.mark.parametrize("pivots", [None, (1, 4, 9)])
@pytest.mark.parametrize("tokens", [1, 6, 200])
def test_a_group_of_quantised_states_computes_what_its_dequantised_states_do(pivots, tokens):
    kernel, inputs = Kernel(), 41 if pivots is None else 41 - 3
    (q_in, exact_in), (q_out, exact_out) = made(8, inputs, 3, 32, axis=0), made(4, 3, 6, 32)
    states = {"input_states": q_in, "output_states": {"a": q_out}}
    floating = {"input_states": jnp.asarray(exact_in, "f"), "output_states": {"a": jnp.asarray(exact_out, "f")}}
    for width in (41, 30):
        x = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, width)), jnp.float32)
        found, wanted = (kernels.forward(kernel, each, "a", x, pivots=pivots) for each in (states, floating))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    found, wanted = (kernels.weights(kernel, each, "a", pivots=pivots) for each in (states, floating))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    if pivots is not None:
        assert len(other_neurons(pivots, 41)) == inputs


@pytest.mark.parametrize("kernel", [Kernel("riemannian", metric_rank=1), Kernel("lifted", lift=5)])
def test_other_kernels_read_quantised_states(kernel):
    floating = init_states(jax.random.key(0), kernel, 3, 41, {"a": 6})
    (q_in, exact_in), (q_out, exact_out) = made(8, 41, 3, 32, axis=0), made(8, 3, 6, 32)
    states = {**floating, "input_states": q_in, "output_states": {"a": q_out}}
    floating |= {"input_states": jnp.asarray(exact_in, "f"), "output_states": {"a": jnp.asarray(exact_out, "f")}}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 41)), jnp.float32)
    found, wanted = (kernels.forward(kernel, each, "a", x) for each in (states, floating))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
