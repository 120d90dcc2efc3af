"""GGUF files that we write, in llama.cpp: the same token ids and logits. Only where llama-cpp-python is installed."""

import dataclasses

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")

from ngc_jax.conversion import chain, convert, quantise  # noqa: E402
from ngc_jax.exporting import export_gguf  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.models.sources import open_source  # noqa: E402
from tests.exporting.test_export import TEXT, bpe_tokenizer, model_of  # noqa: E402
from tests.exporting.test_gguf_families import MODELS  # noqa: E402
from tests.models.compact import dense_model  # noqa: E402
from tests.parity import tiny  # noqa: E402


@pytest.mark.parametrize("family", MODELS)
def test_logits_of_families(family, tmp_path):
    ours = MODELS[family](hidden_size=64, head_dim=16)
    with open_source(str(save_model(ours, tmp_path / "model"))) as source:
        export_gguf(source, tmp_path / "model.gguf", type="f32")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    tokens = tiny.some_tokens()[:1]
    theirs.eval(tokens[0].tolist())
    logits, expected = np.asarray(theirs.scores)[: tokens.shape[1]], tiny.our_logits(ours, tokens)[0]
    # Norms of keys enlarge what its float16 cache rounds away.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-2 * expected.std())


@pytest.mark.parametrize(
    ("family", "width"),
    [("llama", 64), ("qwen2", 64), ("qwen3", 64), ("gemma3", 64), ("qwen2", 96)],  # 4 heads of 16
)
def test_llama_cpp_computes_what_we_compute(family, width, tmp_path):
    # The key-value cache of llama.cpp is in float16.
    ours = model_of(family, hidden_size=width, head_dim=16, query_pre_attn_scalar=16)
    with open_source(str(save_model(ours, tmp_path / "model"))) as source:
        export_gguf(source, tmp_path / "model.gguf", type="f32")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    tokens = tiny.some_tokens()[:1]
    theirs.eval(tokens[0].tolist())
    logits = np.asarray(theirs.scores)[: tokens.shape[1]]
    np.testing.assert_allclose(logits, tiny.our_logits(ours, tokens)[0], rtol=0, atol=1e-2)
    text = TEXT.replace("<bos>", "bos")
    found = theirs.tokenize(text.encode(), add_bos=True, special=True)
    assert found == ours.load_tokenizer().encode(text, special_tokens=True).tolist()


def test_quantised_matrices_keep_their_codes(tmp_path):
    """Against the same weights in float32; llama.cpp multiplies codes by activations that it rounds to 8 bits."""
    dense = dense_model("llama", vocab_size=300, hidden_size=64, head_dim=16, intermediate_size=96)
    ours = convert(dense, chain(quantise(4, 32, feedback=False)))
    ours = dataclasses.replace(ours, load_tokenizer=bpe_tokenizer)
    found = []
    for kind in (None, "f32"):
        with open_source(str(save_model(ours, tmp_path / f"model-{kind}"))) as source:
            export_gguf(source, tmp_path / f"{kind}.gguf", type=kind)
        theirs = llama_cpp.Llama(str(tmp_path / f"{kind}.gguf"), n_ctx=64, logits_all=True, verbose=False)
        tokens = tiny.some_tokens()[0]
        theirs.eval(tokens.tolist())
        found.append(np.asarray(theirs.scores)[: len(tokens)].copy())
    codes, exact = found
    np.testing.assert_allclose(exact, tiny.our_logits(ours, tokens[None])[0], rtol=0, atol=1e-2)
    assert np.abs(codes - exact).mean() < 0.02 * np.abs(exact).mean()
