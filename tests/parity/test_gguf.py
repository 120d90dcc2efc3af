"""GGUF files of transformers' models, written by the gguf package, give the same logits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402

import gguf  # noqa: E402
import transformers  # noqa: E402

from ngc_jax.models.load import load_model  # noqa: E402
from tests.parity import tiny  # noqa: E402

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
# GGUF files of gemma 3 leave these out: they are what the published models have.
GEMMA = {
    "num_hidden_layers": 7,
    "layer_types": None,
    "query_pre_attn_scalar": 10,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 5.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of llama's q or k in GGUF's order: the two rotary halves of a head take turns."""
    head_dim = len(tensor) // heads
    order = [
        head * head_dim + i + half for head in range(heads) for i in range(head_dim // 2) for half in (0, head_dim // 2)
    ]
    return tensor[order]


def write_gguf(model: transformers.PreTrainedModel, path: Path) -> None:
    """Write a model as llama.cpp's converter does."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        if arch == "gemma3" and "norm" in name:
            array = array + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {}),
        ("llama biases", {}),
        ("llama tied", {"head_dim": 10}),
        ("llama linear", {}),
        ("llama llama3", {}),
        ("mistral full", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3", GEMMA),
    ],
)
def test_logits_from_gguf(case: str, changes: dict, tmp_path: Path) -> None:
    theirs = tiny.torch_model(case, **changes)
    write_gguf(theirs, tmp_path / "model.gguf")
    ours = load_model(str(tmp_path / "model.gguf"))
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), tiny.torch_logits(theirs, tokens), rtol=0, atol=1e-4)
