"""GGUF files of families with metadata of their own: what is read is what was written, and the rest is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.exporting import export_gguf
from ngc_jax.models.families import FAMILIES
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.exporting.test_export import model_of
from tests.tiny import forward, random_tokens

GEMMA2 = {"model_type": "gemma2", "attn_logit_softcapping": 8.0, "query_pre_attn_scalar": 16, "head_dim": 16}
PHI3 = {"head_dim": 12}
FOUR = {"num_hidden_layers": 4, "sliding_window_pattern": 4}
# Type -> a model that llama.cpp computes.
MODELS = {
    "gemma": lambda **sizes: model_of("gemma3", model_type="gemma", **sizes),
    "gemma2": lambda **sizes: model_of("gemma3", **{**GEMMA2, **sizes}),
    "granite": lambda **sizes: model_of("granite", **sizes),
    "smollm3": lambda **sizes: model_of("llama", model_type="smollm3", num_hidden_layers=4, **sizes),
    "olmo2": lambda **sizes: model_of("qwen3", model_type="olmo2", **sizes),
    "exaone4": lambda **sizes: model_of("qwen3", model_type="exaone4", sliding_window=None, **sizes),
    "phi3": lambda **sizes: model_of("llama_untied", model_type="phi3", partial_rotary_factor=0.5, **{**PHI3, **sizes}),
    "glm4": lambda **sizes: model_of("glm4", **sizes),
    "cohere": lambda **sizes: model_of("cohere2", model_type="cohere", **sizes),
    "cohere2": lambda **sizes: model_of("cohere2", **FOUR, **sizes),
}


def written(model, place):
    with open_source(str(save_model(model, place / "model"))) as source:
        export_gguf(source, place / "model.gguf", type="f32")
    return load_model(str(place / "model.gguf"))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_what_was_written(name, tmp_path):
    ours = MODELS[name]()
    again = written(ours, tmp_path)
    assert again.config.architecture == name
    tokens = jnp.asarray(random_tokens(20))[None]
    found, expected = (forward(model.params, tokens, decoder=model.decoder)[0] for model in (again, ours))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_every_family_with_files_of_its_own_is_tested():
    named = {name for name, family in FAMILIES.items() if family.gguf is not None}
    assert named - {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"} == set(MODELS)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 17}, "gemma2 models with another scale of queries"),
        ("gemma2", {"sliding_window_pattern": 3}, "other sliding layers than every other"),
        (
            "smollm3",
            {"no_rope_layer_interval": 3, "attention_bias": True},
            "biases and rotary embeddings in other layers",
        ),
        ("olmo2", {"attention_bias": True}, "olmo2 models with biases"),
        ("exaone4", {"sliding_window": 9}, "exaone4 models with sliding windows"),
        ("cohere", {"tie_word_embeddings": False}, "cohere models with a head of its own"),
        ("cohere2", {"sliding_window_pattern": 2}, "other sliding layers than three of four"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(name, changes, words, tmp_path):
    own = {"sliding_window": None} if name == "exaone4" else {}
    base = {"gemma2": ("gemma3", GEMMA2), "cohere": ("cohere2", {}), "cohere2": ("cohere2", FOUR)}.get(
        name, ("llama", {})
    )
    model = model_of(base[0], **{**base[1], "model_type": name, "num_hidden_layers": 4, **own, **changes})
    with pytest.raises(UsageError, match=rf"{words}; export it to hf"):
        written(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
