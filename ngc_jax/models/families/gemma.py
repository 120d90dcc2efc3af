"""Gemma 1, 2 and 3, as text models."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError
from ngc_jax.models.families.llama import GGUF_ATTENTION
from ngc_jax.models.families.reading import (
    FULL,
    SLIDING,
    all_but_every,
    brief,
    layer_types,
    number,
    optional,
    rope,
    windows,
)
from ngc_jax.models.families.record import (
    PRE_AND_POST_NORMS,
    PROJECTIONS,
    QK_NORMS,
    Family,
    Gguf,
    GgufKeys,
    attention_bias,
    only_in_hf,
)

if TYPE_CHECKING:
    from ngc_jax.models.config import DecoderConfig

# Published constants of Gemma 3, which its GGUF files omit.
_PATTERN = 6
_LOCAL_THETA = 10_000.0
_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
# The largest of Gemma 2 and 3, by number of layers: of all others, queries are scaled by the size of a head.
_LARGEST = (46, 62)


def gemma_features(hf: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """What all Gemmas have: norms before and after with offsets of one, soft caps, scaled embeddings and queries.

    Args:
        hf: config.json.
        pattern: Every `pattern`-th layer attends to all tokens, unless config.json says otherwise.
    """
    _refuse_bidirectional(hf)
    layers = hf["num_hidden_layers"]
    sliding = layer_types(hf, layers)
    if sliding is None:
        sliding = all_but_every(number(hf, "sliding_window_pattern", int, pattern), layers)
    return {
        "windows": windows(hf, sliding),
        "post_norms": True,
        "unit_offset_norm": True,
        "embed_scale": hf["hidden_size"] ** 0.5,
        "attention_scale": number(hf, "query_pre_attn_scalar", float) ** -0.5,
        "attention_soft_cap": optional(hf, "attn_logit_softcapping"),
        "logit_soft_cap": optional(hf, "final_logit_softcapping"),
    }


def _gemma1(hf: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_bidirectional(hf)
    # A legacy value of the published files, which means the approximation.
    activation = "gelu_pytorch_tanh" if hf.get("hidden_act") == "gelu" else str(hf.get("hidden_act"))
    return {"activation": activation, "unit_offset_norm": True, "embed_scale": hf["hidden_size"] ** 0.5}


def _refuse_bidirectional(hf: Mapping[str, Any]) -> None:
    if hf.get("use_bidirectional_attention"):
        raise UsageError("bidirectional attention is not supported; expected a causal language model")


def _gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    found = gemma_features(hf, _PATTERN)
    full, local = rope(hf, FULL, 1_000_000.0), rope(hf, SLIDING, _LOCAL_THETA, "rope_local_base_freq")
    ropes = tuple(full if window is None else local for window in found["windows"])
    return found | {"ropes": ropes, "qk_norm": "head"}


def _gguf(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    sliding = _gguf_sliding(keys, config["num_hidden_layers"])
    return {
        **_gguf_both(keys, config, biased),
        "layer_types": [SLIDING if slides else FULL for slides in sliding],
        "rope_local_base_freq": keys.real("rope.freq_base_swa", _LOCAL_THETA),
        **{cap: None if keys.get(cap) is None else keys.real(cap) for cap in _CAPS},
    }


def _gguf2(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    caps = {cap: keys.real(cap, default) for cap, default in zip(_CAPS, (30.0, 50.0), strict=True)}
    return _gguf_both(keys, config, biased) | caps


def _gguf_both(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    heads = config["num_attention_heads"] if config["num_hidden_layers"] in _LARGEST else None
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": bool(biased & GGUF_ATTENTION),
        "sliding_window": keys.integer("attention.sliding_window"),
        "query_pre_attn_scalar": config["hidden_size"] // heads if heads else config["head_dim"],
    }


def _metadata2(config: DecoderConfig) -> dict[str, Any]:
    windows, size = set(config.windows[::2]), config.head_dim
    if config.num_layers in _LARGEST:
        size = config.embed_dim // config.num_heads
    only_in_hf(
        config,
        biases=config.qkv_bias or config.o_bias,
        a_head_of_its_own=not config.tied_embeddings,
        other_sliding_layers_than_every_other=len(windows) > 1 or None in windows or {*config.windows[1::2]} > {None},
        another_scale_of_queries=abs(config.attention_scale * size**0.5 - 1) > 1e-6,
        no_soft_caps=None in (config.attention_soft_cap, config.logit_soft_cap),
    )
    return {"attention.sliding_window": windows.pop()}


def _gguf_sliding(keys: GgufKeys, layers: int) -> tuple[bool, ...]:
    """Which layers use a sliding window: a list in the file, or all but every n-th."""
    key = "attention.sliding_window_pattern"
    pattern = keys.get(key)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise keys.error(key, f"has {len(pattern)} entries, expected one for each of {layers} layers")
        if not all(isinstance(slides, int) for slides in pattern):
            raise keys.error(key, f"is {brief(pattern, 60)}, expected true or false for each layer")
        return tuple(map(bool, pattern))
    return all_but_every(keys.integer(key, _PATTERN), layers)


def _gguf1(keys: GgufKeys, config: Mapping[str, Any], biased: Set[str]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": bool(biased & GGUF_ATTENTION)}


def _metadata1(config: DecoderConfig) -> dict[str, Any]:
    biases = config.qkv_bias or config.o_bias
    only_in_hf(config, biases=biases, a_head_of_its_own=not config.tied_embeddings)
    return {}


GEMMA = Family(
    "gemma",
    "GemmaConfig",
    "GemmaForCausalLM",
    features=_gemma1,
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    biases=attention_bias,
    gguf=Gguf("gemma", _gguf1, _metadata1, offset_norms=True),
    differs="norms with offsets of one; scaled embeddings",
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    features=lambda hf: gemma_features(hf, 2),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    biases=attention_bias,
    modules=PROJECTIONS | PRE_AND_POST_NORMS,
    gguf=Gguf("gemma2", _gguf2, _metadata2, offset_norms=True),
    differs="norms before and after, with offsets of one; soft caps; sliding windows in every other layer",
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    features=_gemma3,
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    biases=attention_bias,
    modules=PROJECTIONS | PRE_AND_POST_NORMS | QK_NORMS,
    gguf=Gguf("gemma3", _gguf, offset_norms=True, windows=True),
    differs="norms before and after, with offsets of one; norms of query and key heads; two rotary bases",
)
