"""Tiny random models that tests share; every dimension has a size of its own."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.tokenizer import Tokenizer, wrap
from ngc_jax.types import Params

_COMMON = {
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
}
HF_CONFIGS = {
    "llama": {**_COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {**_COMMON, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**_COMMON, "model_type": "mistral", "sliding_window": 7},
    "qwen2": {**_COMMON, "model_type": "qwen2"},
    "qwen3": {**_COMMON, "model_type": "qwen3"},
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 20.0,
    },
    # Norms after blocks only, of whole queries and keys too.
    "olmo3": {**_COMMON, "model_type": "olmo3", "sliding_window": 5, "attention_bias": True},
    # Attention and MLP in parallel, layer norms, rotation of neighbours, layers without rotation.
    "cohere2": {
        **_COMMON,
        "model_type": "cohere2",
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "logit_scale": 0.5,
    },
    "granite": {
        **_COMMON,
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
    },
    # Layer norms with biases, MLPs without a gate.
    "starcoder2": {**_COMMON, "model_type": "starcoder2", "norm_epsilon": 1e-5, "tie_word_embeddings": False},
    # Attention and MLP in parallel, each with a norm; q, k and v fused by head; half of each of 3 heads rotated.
    "gpt_neox": {
        **_COMMON,
        "model_type": "gpt_neox",
        "num_attention_heads": 3,
        "rotary_pct": 0.5,
        "hidden_act": "gelu_fast",
    },
    # Learned positions, and matrices stored transposed.
    "gpt2": {"vocab_size": 259, "n_embd": 24, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 512}
    | {"model_type": "gpt2", "tie_word_embeddings": False},
    # Half of each head rotated, norms before and after, fused tensors.
    "glm4": {**_COMMON, "model_type": "glm4", "head_dim": 12},
}


def tiny_tokenizer() -> Tokenizer:
    """One token for every byte, then <eos>, <user> and <assistant>; a chat template of the last two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<user>", "<assistant>"])
    template = (
        "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return wrap(backend, special_tokens={"eos_token": "<eos>"}, chat_template=template)


def tiny_model(architecture: str = "llama", seed: int = 0) -> LanguageModel:
    """A dense model whose norms and biases are random too."""
    hf_config = HF_CONFIGS[architecture]
    # Arrays of its own for each caller: a test may donate them or change the dictionaries.
    params = jax.tree.map(jnp.array, _tiny_params(architecture, seed))
    return LanguageModel("tiny", DecoderConfig.from_hf(hf_config), None, params, hf_config, tiny_tokenizer)


@cache
def _tiny_params(architecture: str, seed: int) -> Params:
    decoder = Decoder(DecoderConfig.from_hf(HF_CONFIGS[architecture]))
    params = decoder.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + (0.1 * generator.standard_normal(leaf.shape)).astype(leaf.dtype), params
    )


@partial(jax.jit, static_argnames="decoder")
def forward(params, tokens, positions=None, *, decoder):
    """Compiled `Decoder.__call__` without a cache."""
    return decoder.apply({"params": params}, tokens, positions)


def random_tokens(count: int, seed: int = 0, vocab_size: int = 256) -> np.ndarray:
    """(count,) int32 token ids, some far likelier than others."""
    return (np.random.default_rng(seed).geometric(0.05, count) % vocab_size).astype(np.int32)
