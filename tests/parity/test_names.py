"""transformers loads our plain directories with our logits, and refuses all others."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from ngc_jax.conversion import Recipe  # noqa: E402
from ngc_jax.conversion.pipeline import convert  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from tests.models.compact import compact_model, dense_model  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import random_tokens  # noqa: E402


@pytest.mark.parametrize("model", [compact_model(), dense_model(ngc_iterations=2)], ids=["grouped", "unrolled"])
def test_what_is_no_plain_model_is_refused(model, tmp_path):
    directory = save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="model type `ngc`"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_pruned_model_is_a_plain_model(family, tmp_path):
    dense = dense_model(family)
    recipe = Recipe("nystrom", keep=0.75, topology="u-g-d")
    pruned = convert(dense, recipe, random_tokens(200), window=32)
    assert pruned.plan is not None
    assert not pruned.plan.groups
    assert pruned.config.mlp_dim < dense.config.mlp_dim
    pruned = dataclasses.replace(pruned, conversion={"method": "nystrom", "source": "tiny"})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        save_model(pruned, tmp_path / "model"),
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.our_logits(pruned, tokens), tiny.torch_logits(theirs, tokens), rtol=0, atol=1e-4)
