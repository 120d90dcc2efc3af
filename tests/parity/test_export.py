"""Exports load in transformers, without code of ours, and give the same logits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from ngc_jax.conversion import Recipe, convert  # noqa: E402
from ngc_jax.exporting import export_gguf, export_huggingface  # noqa: E402
from ngc_jax.models.generate import generate  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.models.sources import open_source  # noqa: E402
from tests.exporting.test_export import model_of  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import random_tokens, tiny_model  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma3"])
def test_an_exported_directory_in_transformers(family, tmp_path):
    ours = model_of(family)
    with open_source(str(save_model(ours, tmp_path / "model"))) as source:
        export_huggingface(source, tmp_path / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), tiny.torch_logits(theirs, tokens), rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Groups of 12345 neurons"
    assert tokenizer(text)["input_ids"] == ours.load_tokenizer().encode(text, special_tokens=True).tolist()


@pytest.mark.parametrize("family", ["llama_untied", "qwen2"])
def test_what_a_conversion_in_the_form_dense_saves(family, tmp_path):
    recipe = Recipe("ngc", keep=0.7, form="dense", propagation=0.5)
    dense = tiny_model(family)
    ours = convert(dense, recipe, random_tokens(600), window=60, batch_size=2)
    save_model(ours, tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.intermediate_size == ours.config.mlp_dim < dense.config.mlp_dim
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), tiny.torch_logits(theirs, tokens), rtol=0, atol=1e-4)
    prompt = torch.as_tensor(tokens[:1, :8])
    continued = theirs.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = generate(ours, [tokens[0, :8].tolist()], max_new_tokens=6)[0]
    assert continued[0, 8:].tolist() == list(ids)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_exported_gguf_file_in_transformers(family, tmp_path):
    # transformers takes the size of a head in a qwen2 file for width over heads, whatever the file says.
    ours = model_of(family, hidden_size=40)
    with open_source(str(save_model(ours, tmp_path / "model"))) as source:
        export_gguf(source, tmp_path / "model.gguf", type="f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), tiny.torch_logits(theirs, tokens), rtol=0, atol=1e-4)
