"""Presents a GGUF file as a Hugging Face model: config.json's dict, tensor names, row orders and norm conventions.

Supported architectures: llama (and Mistral, which uses the same one), qwen2, qwen3, gemma3.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf_config import ROPE_FACTORS, config_from_gguf
from ngc_jax.models.gguf_file import GgufFile, can_dequantise
from ngc_jax.models.gguf_tokenizer import tokenizer_from_gguf

if TYPE_CHECKING:
    from ngc_jax.models.tokenizer import Tokenizer

_OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufSource:
    """A GGUF file as a source of a model (see `sources.Source`)."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            UsageError: the file is damaged, of an unsupported architecture, lacks metadata, or holds a tensor of a
                type that cannot be dequantised.
        """
        self.name = path.stem
        self._file = GgufFile(path)
        try:
            self.config: dict[str, Any] = config_from_gguf(self._file)
            arch = self._file.metadata["general.architecture"]
            self._gguf_names = {
                hf_name(arch, name): name for name in self._file.tensors if name != ROPE_FACTORS
            }
            self._undo = _undo_functions(arch, self.config)
            self._check_types()
        except BaseException:
            self._file.close()
            raise
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: self._file.tensors[gguf_name].shape for name, gguf_name in self._gguf_names.items()
        }

    def _check_types(self) -> None:
        for info in self._file.tensors.values():
            if not can_dequantise(info.type):
                raise UsageError(
                    f"{self._file.path}: tensor {info.name} has type {info.type.name}, which cannot be dequantised; "
                    "requantise the file to a common type such as Q8_0 or F16"
                )

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32, in Hugging Face's convention.

        Raises:
            UsageError: no tensor has that name, or the file has shrunk.
        """
        if name not in self._gguf_names:
            raise UsageError(
                f"{self._file.path}: has no tensor {name!r}; expected one of the names in shapes"
            )
        gguf_name = self._gguf_names[name]
        tensor = self._file.read(gguf_name)
        for suffix, undo in self._undo.items():
            if gguf_name.endswith(suffix):
                tensor = undo(tensor)
        return tensor

    def tokenizer(self) -> "Tokenizer":
        """Builds the tokenizer from the file's metadata.

        Raises:
            UsageError: the file has no tokenizer, or one of an unsupported kind.
        """
        return tokenizer_from_gguf(self._file.metadata, str(self._file.path))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hf_name(arch: str, gguf_name: str) -> str:
    """Translates a tensor's name; a name that is not in the table is returned unchanged.

    >>> hf_name("llama", "blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, kind = gguf_name.rpartition(".")
    if stem in _OUTSIDE_LAYERS:
        return f"{_OUTSIDE_LAYERS[stem]}.{kind}"
    in_layer = _IN_LAYER | (_SANDWICH_NORMS if arch == "gemma3" else _PRE_NORMS)
    match stem.split("."):
        case ["blk", layer, part] if part in in_layer:
            return f"model.layers.{layer}.{in_layer[part]}.{kind}"
    return gguf_name


def unpermute_rotary(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes GGUF's order of the query and key rows of llama.

    Within each head GGUF interleaves the two rotary halves (0, H/2, 1, H/2 + 1, ...), Hugging Face keeps them apart.

    Args:
        rows: weight (n_heads * H, D) or bias (n_heads * H,) in GGUF order.
        n_heads: heads in `rows`: query heads for q, key-value heads for k.

    Returns:
        The same rows in Hugging Face order, contiguous.
    """
    half = rows.shape[0] // n_heads // 2
    pairs = rows.reshape(n_heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _undo_functions(arch: str, config: Mapping[str, Any]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Maps the end of a GGUF name to the function that restores Hugging Face's convention."""
    if arch == "llama":
        n_q, n_k = config["num_attention_heads"], config["num_key_value_heads"]
        return {
            ".attn_q.weight": lambda tensor: unpermute_rotary(tensor, n_q),
            ".attn_q.bias": lambda tensor: unpermute_rotary(tensor, n_q),
            ".attn_k.weight": lambda tensor: unpermute_rotary(tensor, n_k),
            ".attn_k.bias": lambda tensor: unpermute_rotary(tensor, n_k),
        }
    if arch == "gemma3":
        # GGUF stores the factor 1 + w that multiplies, Hugging Face stores w.
        return {"norm.weight": lambda tensor: tensor - np.float32(1)}
    return {}
