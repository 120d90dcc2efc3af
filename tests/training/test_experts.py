"""Placement of mixtures of experts on several devices."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ngc_jax.models.config import DecoderConfig
from ngc_jax.training.sharding import make_mesh, params_shardings, partition_spec
from tests.models.compact import compact_plan
from tests.models.test_experts import QWEN, sparse_model
from tests.tiny import forward, random_tokens

FOUR = {**QWEN, "num_experts": 4, "vocab_size": 256}


def test_experts_are_distributed() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert partition_spec("layers/0/mlp/u/kernel", (4, 14, 24), mesh) == PartitionSpec("tensor", None, "fsdp")
    assert partition_spec("layers/0/mlp/d/kernel", (4, 24, 14), mesh) == PartitionSpec("tensor", "fsdp", None)
    assert partition_spec("layers/1/mlp/u/kernel", (40, 24), mesh) == PartitionSpec("tensor", "fsdp")
    assert partition_spec("layers/0/mlp/router/kernel", (4, 24), mesh) == PartitionSpec(None, "fsdp")
    own = "groups/2-d.1/output_states/layers.2.mlp.d.1"
    assert partition_spec(own, (24, 4), mesh) == PartitionSpec("fsdp", "tensor")


def test_logits_do_not_depend_on_the_placement() -> None:
    mesh, tokens = make_mesh(data=2, fsdp=2, tensor=2), random_tokens(24)[None]
    model = sparse_model({**FOUR, "num_hidden_layers": 1, "mlp_only_layers": []})
    placed = jax.device_put(model.params, params_shardings(model.params, mesh))
    found = forward(placed, tokens, decoder=model.decoder)[0]
    np.testing.assert_allclose(found, forward(model.params, tokens, decoder=model.decoder)[0], atol=5e-5)


def test_experts_left_dense_beside_groups_are_replicated_where_their_number_does_not_divide() -> None:
    model = sparse_model(FOUR, compact_plan(DecoderConfig.from_hf(FOUR)))
    kernel = model.params["layers"]["2"]["mlp"]["u"]["kernel"]
    assert kernel.shape == (1, 14, 24)
    shardings = params_shardings(model.params, make_mesh(data=2, fsdp=2, tensor=2))
    assert shardings["layers"]["2"]["mlp"]["u"]["kernel"].spec == PartitionSpec(None, None, "fsdp")
