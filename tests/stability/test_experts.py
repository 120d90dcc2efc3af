"""Stability along depth of a mixture of experts: the routing weights have derivatives, the choice of experts none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.layerwise import embed, layer_of
from ngc_jax.stability.depth import depth_stability
from tests.models.compact import compact_plan
from tests.models.test_experts import QWEN, sparse_model
from tests.tiny import random_tokens


@pytest.mark.slow
def test_the_last_tokens_metric_is_the_norm_of_its_jacobian() -> None:
    """No other token reads the last one, so that its stream alone can be differentiated through all layers."""
    hf_config = {**QWEN, "num_hidden_layers": 2, "mlp_only_layers": []}
    model = sparse_model(hf_config, compact_plan(DecoderConfig.from_hf(hf_config)))
    tokens = jnp.asarray(random_tokens(5)[None])
    found = depth_stability(model.decoder, model.params, tokens, key=jax.random.key(0), directions=24)

    @jax.jit
    def expected(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def last(own: jax.Array) -> jax.Array:
            stream, positions = x.at[0, -1].set(own), jnp.arange(5)[None]
            for layer in range(2):
                stream, _ = layer_of(model.decoder, model.params, layer)(stream, positions)
            return stream[0, -1]

        return jax.jacfwd(last)(x[0, -1]), last(x[0, -1])

    x = embed(model.decoder, model.params, tokens)
    jacobian, end = map(np.asarray, expected(x))
    growth = np.log(np.sqrt(np.square(jacobian).sum() / 24))
    longer = np.log(np.linalg.norm(end) / np.linalg.norm(x[0, -1]))
    assert float(found.metric[0, -1]) == pytest.approx((growth - longer) / 2, abs=1e-3)
    assert set(found.signals) == {group.name for group in model.plan.groups if "-d." not in group.name}
    assert all(np.isfinite(signal).all() for signal in found.signals.values())
