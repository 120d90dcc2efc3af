"""A GGUF file for llama.cpp and programs based on it.

Groups are folded into dense weights: llama.cpp has no operation for shared states, so a model with groups gets the size
of its dense architecture. A model with pruned hidden neurons and no other change keeps its smaller size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from ngc_jax.errors import UsageError
from ngc_jax.exporting.folded import FoldedSource
from ngc_jax.exporting.gguf_codes import gguf_blocks, gguf_type
from ngc_jax.exporting.gguf_vocabulary import vocabulary_metadata
from ngc_jax.files import atomic_file, check_target
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.families import FAMILIES, Gguf, family_of, gguf_families
from ngc_jax.models.fused import fused_names
from ngc_jax.models.gguf.config import ROPE_FACTORS
from ngc_jax.models.gguf.names import gguf_fused_name, gguf_name
from ngc_jax.models.rope import Rope
from ngc_jax.models.sources import Source

_log = logging.getLogger(__name__)

GGUF_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def export_gguf(
    source: Source,
    file: str | Path,
    *,
    type: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a model, dense or compact, as one GGUF file.

    Vectors are stored in float32, matrices in the requested type; a matrix whose rows are not a whole number of that
    type's blocks is stored in float16. Without a requested type, matrices that a conversion quantised keep their codes
    and scales, as q4_0, q4_1 or q8_0, and all others are stored as q8_0. One tensor is in memory at a time.

    Args:
        source: The model, from `models.sources.open_source`.
        file: Where to write it, atomically.
        type: One of `GGUF_TYPES`; None for quantised matrices as they are.
        overwrite: Replace an existing file.
        progress: Called with (tensors written, total).

    Returns:
        A summary: file, type (that of most parameters), parameters, bytes, whether groups were folded, the number of
        matrices that are stored in float16 because their rows do not fit the type, and of those that keep their codes.

    Raises:
        UsageError: If GGUF cannot represent the type or a part of the model, or the file cannot be written.

    Example:
        >>> from ngc_jax import save_model
        >>> from ngc_jax.models.sources import open_source
        >>> with open_source(str(save_model(compact, "for-gguf"))) as source:
        ...     export_gguf(source, "compact.gguf", type="f16")["folded"]
        True
    """
    if type is not None and type not in GGUF_TYPES:
        raise UsageError(f"GGUF type {type!r} is not supported; expected one of {', '.join(GGUF_TYPES)}")
    file = Path(file)
    _check_file(file, overwrite)
    folded = FoldedSource(source)
    described = _described(folded.decoder_config)
    described.metadata(folded.decoder_config)  # refuses what cannot be written before anything is
    kinds = _kinds(folded, type)
    most = _most_common(folded, kinds)
    with atomic_file(file) as temporary:
        writer = GGUFWriter(temporary, described.name)
        _add_metadata(writer, folded, GGUF_TYPES[most][1])
        _add_tensors(writer, folded, kinds, progress)
        writer.close()
    matrices = [name for name, shape in folded.shapes.items() if len(shape) > 1]
    return {
        "out": str(file),
        "type": most,
        "folded": folded.compact,
        "parameters": sum(int(np.prod(shape)) for shape in folded.shapes.values()),
        "bytes": file.stat().st_size,
        "float16_matrices": 0 if type == "f16" else sum(kinds[n].kind == GGMLQuantizationType.F16 for n in matrices),
        "matrices_with_their_codes": sum(kinds[name].codes for name in matrices),
    }


def _described(config: DecoderConfig) -> Gguf:
    """How llama.cpp's files describe the architecture.

    Where llama.cpp takes for granted that the heads are together as wide as the residual stream, and they are not, the
    model is written as another architecture that computes the same function.
    """
    described = family_of(config.architecture).gguf
    if described is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf is not None)
        raise UsageError(
            f"{config.architecture} models cannot be written as GGUF files, only those of {known}; export it to hf"
        )
    if described.wide_heads is not None and config.num_heads * config.head_dim != config.embed_dim:
        other = gguf_families()[described.wide_heads].gguf
        assert other is not None
        return other
    return described


def _check_file(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise UsageError(f"{file} is a directory; give the name of a file, such as {file / 'model.gguf'}")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is a device or a pipe, and GGUF is not written in order; give the name of a file")
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists; choose another name or overwrite it")
    check_target(str(file), option="the output")


def _add_metadata(writer: GGUFWriter, folded: FoldedSource, file_type: LlamaFileType) -> None:
    config = folded.decoder_config
    writer.add_name(folded.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    described = _described(config)
    for key, value in {described.eps: config.norm_eps, **described.metadata(config)}.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{described.name}.{key}", value)
    writer.add_rope_dimension_count(_full_rope(config).rotated(config.head_dim))
    _add_rope(writer, config)
    _add_windows(writer, config)
    if config.logit_soft_cap is not None:
        writer.add_final_logit_softcapping(config.logit_soft_cap)
    if config.attention_soft_cap is not None:
        writer.add_attn_logit_softcapping(config.attention_soft_cap)
    for key, value in vocabulary_metadata(folded.tokenizer(), config.vocab_size, folded.name).items():
        _add_key(writer, key, value)


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _full_rope(config: DecoderConfig) -> Rope:
    """The rotary embedding of full-attention layers; of all, if they have none."""
    ropes = [(rope, window) for rope, window in zip(config.ropes, config.windows, strict=True) if rope is not None]
    return next((rope for rope, window in ropes if window is None), ropes[0][0])


def _add_rope(writer: GGUFWriter, config: DecoderConfig) -> None:
    """The rotary base and scaling of full-attention layers."""
    rope = _full_rope(config)
    writer.add_rope_freq_base(rope.theta)
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_length)
        if (rope.beta_fast, rope.beta_slow) != (32.0, 1.0):
            writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """Divisors of the rotary frequencies, for scalings that GGUF stores as a tensor."""
    rope = config.ropes[0]
    if rope is None or rope.rope_type not in ("llama3", "explicit"):
        return None
    plain = rope.theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    return (plain / rope.inverse_frequencies(config.head_dim)).astype(np.float32)


def _add_windows(writer: GGUFWriter, config: DecoderConfig) -> None:
    windows = {window for window in config.windows if window is not None}
    if not windows:
        return
    described = _described(config)
    if "attention.sliding_window" in described.metadata(config):
        return
    if described.windows:
        writer.add_sliding_window(windows.pop())
        writer.add_sliding_window_pattern([window is not None for window in config.windows])
    elif min(windows) < config.max_length:
        _log.warning(
            "llama.cpp has no sliding window for %s: beyond %s tokens its outputs differ",
            config.architecture,
            min(windows),
        )


class _Kind(NamedTuple):
    """How a tensor is stored, and whether by the codes that it has."""

    kind: GGMLQuantizationType
    codes: bool = False


def _kinds(folded: FoldedSource, type: str | None) -> dict[str, _Kind]:
    """The type of every tensor."""
    kinds = {}
    for name, shape in folded.shapes.items():
        if len(shape) == 1:
            kinds[name] = _Kind(GGMLQuantizationType.F32)
            continue
        matrix = folded.read_quantised(name) if type is None else None
        own = None if matrix is None else gguf_type(matrix)
        kind = GGUF_TYPES[type or "q8_0"][0] if own is None else own
        fits = shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
        kinds[name] = _Kind(kind if fits else GGMLQuantizationType.F16, own is not None)
    for parts in fused_names(folded.shapes, family_of(folded.decoder_config.architecture)).values():
        if len({kinds[part].kind for part in parts}) > 1:  # one tensor has one type
            kinds |= dict.fromkeys(parts, _Kind(GGUF_TYPES["f16"][0]))
    return kinds


def _most_common(folded: FoldedSource, kinds: Mapping[str, _Kind]) -> str:
    """The type of most parameters."""
    sizes = {
        name: sum(math.prod(folded.shapes[n]) for n, k in kinds.items() if k.kind == kind)
        for name, (kind, _) in GGUF_TYPES.items()
    }
    return max(sizes, key=sizes.__getitem__)


def _add_tensors(
    writer: GGUFWriter,
    folded: FoldedSource,
    kinds: Mapping[str, _Kind],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write header and tensors."""
    config = folded.decoder_config
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    whole = fused_names(folded.shapes, family_of(config.architecture))
    for name, parts in whole.items():
        kind, first = kinds[parts[0]].kind, folded.shapes[parts[0]]
        shape = (sum(folded.shapes[part][0] for part in parts), *first[1:])
        own = gguf_name(folded.parameter(name)) if len(parts) == 1 else gguf_fused_name(name)
        writer.add_tensor_info(own, shape, np.dtype(np.float32), _stored_bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for done, parts in enumerate(whole.values(), start=1):
        tensors = [_stored(folded, part, kinds[part]) for part in parts]
        writer.write_tensor_data(tensors[0] if len(tensors) == 1 else np.concatenate(tensors))
        if progress is not None:
            progress(done, len(whole))


def _stored(folded: FoldedSource, name: str, how: _Kind) -> np.ndarray:
    """A tensor as the file has it, by its codes or quantised here."""
    parameter, config = folded.parameter(name), folded.decoder_config
    matrix = folded.read_quantised(name) if how.codes else None
    if matrix is not None:
        return _in_gguf_order(gguf_blocks(matrix), parameter, config)
    return quantize(_in_gguf_order(folded.read(name).astype(np.float32), parameter, config), how.kind)


def _stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes


def _in_gguf_order(tensor: np.ndarray, parameter: str, config: DecoderConfig) -> np.ndarray:
    """A tensor in GGUF's conventions: some architectures' rotary halves are interleaved, norms include their one."""
    module, _, leaf = parameter.rpartition(".")
    if _described(config).offset_norms and leaf == "scale":
        return tensor + np.float32(1)
    role = module.rpartition(".")[2]
    if _described(config).paired_rotary and role in ("q", "k"):
        heads = config.num_heads if role == "q" else config.num_kv_heads
        halves = tensor.reshape(heads, 2, config.head_dim // 2, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor
