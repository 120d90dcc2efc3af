"""Tiny random models of transformers' own, whose sizes are all distinct, so that no swapped axis can pass.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params

VOCAB, LENGTH, BATCH = 53, 45, 2

# 24 wide with 6 heads is 4 per head unless a case says otherwise; 3 query heads share a key-value head.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,  # large enough to be seen in the logits
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
_GEMMA = {
    "head_dim": 10,
    "num_hidden_layers": 5,
    "sliding_window": 9,
    "query_pre_attn_scalar": 17,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
_GEMMA_LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 5.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

# Name of the case -> (architecture, what its config says beside the sizes).
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 10}),
    "llama no kv heads": ("llama", {"num_key_value_heads": 6, "hidden_act": "gelu"}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 200.0, "factor": 3.0}},
    ),
    "llama llama3": ("llama", {"head_dim": 16, "rope_parameters": _LLAMA3_ROPE}),
    "llama yarn": ("llama", {"head_dim": 16, "rope_parameters": _YARN_ROPE}),
    "llama yarn mscale": (
        "llama",
        {
            "head_dim": 16,
            "rope_parameters": _YARN_ROPE | {"mscale": 2.0, "mscale_all_dim": 0.7, "truncate": False},
        },
    ),
    "llama yarn factor": (
        "llama",
        {"head_dim": 16, "rope_parameters": _YARN_ROPE | {"attention_factor": 1.3}},
    ),
    "mistral": ("mistral", {"sliding_window": 11}),
    "mistral full": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3 biases": ("qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 sliding": (
        "qwen3",
        {"head_dim": 10, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "gemma3": ("gemma3_text", _GEMMA),
    "gemma3 linear": ("gemma3_text", {**_GEMMA, "rope_parameters": _GEMMA_LINEAR_ROPE}),
    "gemma3 soft cap": ("gemma3_text", {**_GEMMA, "final_logit_softcapping": 2.5}),
    "gemma3 biases": (
        "gemma3_text",
        {
            **_GEMMA,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_activation": "gelu",
        },
    ),
}
_KINDS = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
_WINDOWS = {"num_hidden_layers": 5, "sliding_window": 9, "layer_types": _KINDS}
# The cases of families beside the first five; at least one each, with as much in it as the family can have.
CASES = {
    **CASES,
    "gemma": ("gemma", {"head_dim": 10, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 10,
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "query_pre_attn_scalar": 17,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (
        "phi3",
        {
            "hidden_size": 48,
            "sliding_window": 11,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3 long": (
        "phi3",
        {
            "hidden_size": 48,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.7, 2.5],
                "long_factor": [2.0, 5.0, 9.0],
            },
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3": (
        "smollm3",
        {
            "num_hidden_layers": 5,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": (
        "olmo3",
        {
            **_WINDOWS,
            "hidden_size": 96,
            "rope_parameters": {
                "full_attention": _YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "ministral": ("ministral", {**_WINDOWS, "head_dim": 10}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": _YARN_ROPE | {"original_max_position_embeddings": 60, "llama_4_scaling_beta": 0.4},
        },
    ),
    "exaone4": ("exaone4", {**_WINDOWS, "sliding_window_pattern": 2}),
    "exaone4 full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "stablelm": (
        "stablelm",
        {
            "hidden_size": 96,
            "layer_norm_eps": 3e-4,
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
        },
    ),
    "stablelm parallel": (
        "stablelm",
        {"hidden_size": 96, "layer_norm_eps": 3e-4, "use_parallel_residual": True, "tie_word_embeddings": True},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 3e-4, "sliding_window": 11, "tie_word_embeddings": False}),
    "nemotron": ("nemotron", {"head_dim": 12, "norm_eps": 3e-4, "attention_bias": True, "mlp_bias": True}),
    "glm": ("glm", {"head_dim": 12, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 12, "attention_bias": True}),
    "cohere": ("cohere", {"layer_norm_eps": 3e-4, "logit_scale": 0.8, "tie_word_embeddings": False}),
    "cohere2": (
        "cohere2",
        {
            **_WINDOWS,
            "layer_norm_eps": 3e-4,
            "logit_scale": 0.8,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}
_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3}
_LOCAL_EXPERTS = {"num_local_experts": 7, "num_experts_per_tok": 3}
CASES = {
    **CASES,
    # The second of three layers is dense.
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_EXPERTS,
            "head_dim": 10,
            "moe_intermediate_size": 14,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 11,
        },
    ),
    "qwen3_moe normalised": (
        "qwen3_moe",
        {**_EXPERTS, "head_dim": 10, "moe_intermediate_size": 14, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "mixtral": ("mixtral", {**_LOCAL_EXPERTS, "head_dim": 10, "sliding_window": 11}),
    "olmoe": ("olmoe", {**_EXPERTS, "attention_bias": True}),
    "granitemoe": (
        "granitemoe",
        {
            **_LOCAL_EXPERTS,
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
}


def torch_config(case: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The transformers config of a case."""
    architecture, settings = CASES[case]
    # A config takes over the dictionaries it is given and writes into them.
    settings = json.loads(json.dumps({**_SIZES, **settings, **changes}))
    return transformers.AutoConfig.for_model(architecture, **settings)


def loops(architecture: str) -> dict[str, str]:
    """transformers' plain loop over experts: its grouped products need sizes that are multiples of four."""
    mixture = architecture in ("qwen3_moe", "mixtral", "olmoe", "granitemoe")
    return {"experts_implementation": "eager"} if mixture else {}


def torch_model(case: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random model in float32; norms and biases are random too."""
    model = transformers.AutoModelForCausalLM.from_config(
        torch_config(case, **changes),
        dtype=torch.float32,
        attn_implementation="eager",
        **loops(CASES[case][0]),
    )
    randomise(model, seed)
    return model


def torch_load(directory: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A saved model, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", **loops(read_config(directory)["model_type"])
    )
    return model.eval()


def randomise(model: transformers.PreTrainedModel, seed: int = 0) -> None:
    """Draw every parameter again: matrices preserve the size of their inputs, norms are near their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter += (0.1 if name.endswith("bias") else 0.4) * noise
            elif parameter.ndim < 2:
                parameter.copy_(0.4 * noise)
            elif "embed_tokens" in name:
                # Tied embeddings that outweigh what the layers write make every token its own successor.
                parameter.copy_((0.2 if model.config.tie_word_embeddings else 0.7) * noise)
            else:
                parameter.copy_(1.5 * parameter.shape[-1] ** -0.5 * noise)
    model.eval()


def some_tokens(seed: int = 1) -> np.ndarray:
    """Random token ids (B, L), longer than every sliding window of the cases."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, L, V) in float32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def our_logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, L, V) in float32."""
    return np.asarray(_logits(model.decoder, model.params, tokens))


@partial(jax.jit, static_argnums=0)  # one program per decoder, whatever test it is in
def _logits(decoder: Decoder, params: Params, tokens_BxL: jax.Array) -> jax.Array:
    return decoder.apply({"params": params}, tokens_BxL)[0]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a saved model."""
    return json.loads((directory / "config.json").read_text())


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Replace the config.json of a saved model."""
    (directory / "config.json").write_text(json.dumps(config))
