"""Small GGUF files by the gguf package's own writer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ngc_jax.errors import UsageError

# Vocabulary, hidden, head, MLP, heads: no two dimensions alike, rows multiples of 32 so that blocks fit.
V, D, H, F, N, K, LAYERS = 40, 64, 24, 160, 4, 2, 3


def metadata(arch: str, **changes: Any) -> dict[str, Any]:
    keys = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.key_length": H,
        "attention.value_length": H,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50_000.0,
        "rope.dimension_count": H,
    }
    if arch == "gemma3":
        keys["attention.sliding_window"] = 512
    return {f"{arch}.{key}": value for key, value in (keys | changes).items()}


def hf_tensors(arch: str, *, tied: bool = True, biases: bool = False) -> dict[str, np.ndarray]:
    """Random tensors under the names that transformers' models have."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if arch == "gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {f"{norm}.weight": (D,) for norm in norms}
        for role, rows in (("q", N * H), ("k", K * H), ("v", K * H)):
            parts[f"self_attn.{role}_proj.weight"] = (rows, D)
            if biases:
                parts[f"self_attn.{role}_proj.bias"] = (rows,)
        if arch in ("qwen3", "gemma3"):
            parts |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        parts |= {"self_attn.o_proj.weight": (D, N * H), "mlp.gate_proj.weight": (F, D)}
        parts |= {"mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleave(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """What converters do to llama's q and k, written as a list: rows 0, H/2, 1, H/2 + 1, ... of every head."""
    order = [head * H + half * (H // 2) + pair for head in range(n_heads) for pair in range(H // 2) for half in (0, 1)]
    return rows[order]


def gguf_tensors(arch: str, hf: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
    tensors = {}
    for name, tensor in hf.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor, N if "q_proj" in name else K)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        gguf_name = names.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None
        tensors[gguf_name] = tensor
    return tensors


def write(
    path: Path,
    arch: str,
    tensors: Mapping[str, np.ndarray],
    keys: Mapping[str, Any],
    *,
    kind: str = "F32",
    split: int = 0,
) -> Path:
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        adders[type(value)](key, value)
    for name, tensor in tensors.items():
        quantised = kind if tensor.ndim > 1 else "F32"
        writer.add_tensor(name, gguf.quantize(tensor, Type[quantised]), raw_dtype=Type[quantised])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(path: Path, arch: str = "llama", **changes: Any) -> Path:
    return write(path, arch, gguf_tensors(arch, hf_tensors(arch)), metadata(arch, **changes))


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expects a UsageError of one line that says all of `parts`."""
    with pytest.raises(UsageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
