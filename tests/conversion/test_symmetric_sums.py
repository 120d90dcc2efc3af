import jax
import numpy as np
import pytest

from ngc_jax.conversion.symmetric_sums import gram, whole, zero_bands


@pytest.mark.parametrize("width", [1, 7, 384, 385, 1000])
def test_gram_is_the_whole_product(width):
    x = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    bands = jax.jit(gram)(x)
    assert [band.shape for band in bands] == [band.shape for band in zero_bands(width)]
    found = whole(map(np.asarray, bands))
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, x.T.astype(np.float64) @ x, rtol=1e-5, atol=1e-4)
