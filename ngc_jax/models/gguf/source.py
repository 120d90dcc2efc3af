"""Presents a GGUF file as a Hugging Face model: config, tensor names, row orders and norm conventions.

Supported are the architectures of the families whose records have an entry for GGUF.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing
from ngc_jax.models.families import gguf_families
from ngc_jax.models.fused import Rows, fused_rows
from ngc_jax.models.gguf.config import ROPE_FACTORS, biased_parts, config_from_gguf
from ngc_jax.models.gguf.file import GgufFile
from ngc_jax.models.gguf.names import FUSED, IN_LAYER, TOP
from ngc_jax.models.gguf.tokenizer import is_utf8, tokenizer_from_gguf
from ngc_jax.models.tokenizer import Tokenizer

# Rotary factors are read with the config; old files repeat them in every layer.
_UNUSED = re.compile(rf"^{re.escape(ROPE_FACTORS)}$|\.(attn_rot_embd|rope_freqs)(\.weight)?$")


class GgufSource(Closing):
    """A GGUF file as a source of a model (see `sources.Source`)."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            UsageError: the file is damaged, of an unsupported architecture, lacks metadata, or holds a tensor
                of a type that cannot be dequantised.
        """
        self.name = path.stem if path.suffix.lower() == ".gguf" else path.name  # "llama-3.2" has no suffix
        self._file = GgufFile(path)
        try:
            self.config: dict[str, Any] = config_from_gguf(self._file)
            for gguf_name in self._file.tensors:
                self._file.check_type(gguf_name)
        except BaseException:
            self._file.close()
            raise
        self._arch = self._file.metadata["general.architecture"]
        described = gguf_families()[self._arch].gguf
        assert described is not None
        self._described = described
        self._gguf_names = {hf_name(self._arch, name): name for name in self._file.tensors if not _UNUSED.search(name)}
        stored = {name: self._file.tensors[gguf_name] for name, gguf_name in self._gguf_names.items()}
        self._zeros = self._missing_biases()
        shapes: dict[str, tuple[int, ...]] = {name: info.shape for name, info in stored.items()}
        sizes = {name: info.n_bytes for name, info in stored.items()}
        # By the name of a matrix in a fused tensor: that tensor, and the matrix's rows.
        self._rows: dict[str, tuple[str, Rows]] = {}
        for whole, parts in fused_rows(shapes, self.config, str(path)).items():
            columns, n_bytes = shapes.pop(whole)[1:], sizes.pop(whole)
            total = sum(rows.count for rows in parts.values())
            for part, rows in parts.items():
                self._rows[part] = (whole, rows)
                shapes[part], sizes[part] = (rows.count, *columns), n_bytes * rows.count // total
        self._last: tuple[str, np.ndarray] | None = None
        self.shapes: Mapping[str, tuple[int, ...]] = shapes | self._zeros
        self.sizes: Mapping[str, int] = sizes
        self.sizes |= dict.fromkeys(self._zeros, 0)
        self.nbytes = sum(self.sizes.values())
        self.files = self._file.paths
        named = self._file.metadata.get("general.license")
        self.license = named if isinstance(named, str) and named and is_utf8(named) else None
        self._tokenizer: Tokenizer | None = None

    def _missing_biases(self) -> dict[str, tuple[int, ...]]:
        """Biases of the architecture that this file does not have, with their shapes: they are 0."""
        missing = {}
        for layer in range(self.config["num_hidden_layers"]):
            for part in biased_parts(self.config):
                weight = self._file.tensors.get(f"blk.{layer}.{part}.weight")
                if weight is not None and f"blk.{layer}.{part}.bias" not in self._file.tensors:
                    missing[hf_name(self._arch, f"blk.{layer}.{part}.bias")] = weight.shape[:1]
        return missing

    def read_quantised(self, name: str) -> None:
        """None: a GGUF file's tensors are dequantised when they are read."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32, in Hugging Face's convention.

        Raises:
            UsageError: no tensor has that name, the file has shrunk, or the shape does not fit the heads.
        """
        if name in self._zeros:
            return np.zeros(self._zeros[name], np.float32)
        if name in self._rows:
            whole, rows = self._rows[name]
            if self._last is None or self._last[0] != whole:
                self._last = (whole, self._file.read(self._gguf_names[whole]))
            return rows.take(self._last[1])
        if name not in self._gguf_names:
            raise UsageError(f"{self._file.path}: has no tensor {name!r}; ask for one of the names in shapes")
        gguf_name = self._gguf_names[name]
        tensor = self._file.read(gguf_name)
        if self._described.offset_norms and gguf_name.endswith("norm.weight"):
            # GGUF stores the factor 1 + w, Hugging Face stores w.
            return tensor - np.float32(1)
        part = gguf_name.rpartition(".")[0].rpartition(".")[2]
        if self._described.paired_rotary and part in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            n_heads = self.config[heads]
            if tensor.shape[0] != n_heads * self.config["head_dim"]:
                raise UsageError(
                    f"{self._file.path}: tensor {gguf_name} has {tensor.shape[0]} rows, "
                    f"expected {n_heads} heads of "
                    f"{self.config['head_dim']}; convert the model again"
                )
            return unpermute_rotary(tensor, n_heads)
        return tensor

    def tokenizer(self) -> Tokenizer:
        """Builds the tokenizer from the file's metadata; can still be called after `close`.

        Raises:
            UsageError: the file has no tokenizer, one of an unsupported kind, or one of more tokens than the model has.
        """
        if self._tokenizer is None:  # warn about guesses once
            tokenizer = tokenizer_from_gguf(self._file.metadata, str(self._file.path))
            if tokenizer.vocab_size > self.config["vocab_size"]:
                raise UsageError(
                    f"{self._file.path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding "
                    f"{self.config['vocab_size']} rows; convert the model again, or give another tokenizer"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def hf_name(arch: str, gguf_name: str) -> str:
    """Translates a tensor's name; a name that is not in the table is returned unchanged.

    >>> hf_name("llama", "blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, kind = gguf_name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    family = gguf_families()[arch]
    modules = family.modules
    match stem.split("."):
        case ["blk", layer, part] if FUSED.get(part) in family.fused:
            return f"model.layers.{layer}.{FUSED[part]}.{kind}"
        case ["blk", layer, part] if IN_LAYER.get(part) in modules:
            return f"model.layers.{layer}.{modules[IN_LAYER[part]]}.{kind}"
    return gguf_name


def unpermute_rotary(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes GGUF's order of llama's query and key rows.

    Within each head GGUF interleaves the two rotary halves (0, H/2, 1, H/2 + 1, ...); Hugging Face keeps them
    apart.

    Args:
        rows: weight (n_heads * H, D) or bias (n_heads * H,) in GGUF order; H is even.
        n_heads: heads in `rows`: query heads for q, key-value heads for k.

    Returns:
        The same rows in Hugging Face order, contiguous.
    """
    half = rows.shape[0] // n_heads // 2
    pairs = rows.reshape(n_heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
