"""What is known of architectures that are not supported: the nearest supported one, and the difference."""

from __future__ import annotations

_EXPERTS = "its MLPs are mixtures of experts"
_NO_GATE = "its MLPs have no gate"
_IMAGES = "some of its layers attend to images"
_LATENT = "its keys and values are read from a latent vector of their own, and its MLPs are mixtures of experts"

# model_type -> (the nearest family, the difference).
RELATIVES: dict[str, tuple[str, str]] = {
    "apertus": ("llama", _NO_GATE),
    "bloom": ("llama", f"it has no rotary embedding, and {_NO_GATE}"),
    "cohere2_vision": ("cohere2", "it is multimodal; its text decoder is not read"),
    "deepseek_v2": ("llama", _LATENT),
    "deepseek_v3": ("llama", _LATENT),
    "exaone_moe": ("exaone4", _EXPERTS),
    "falcon": ("llama", _NO_GATE),
    "gemma": ("gemma2", "it has no norms after attention and MLP, and no soft caps"),
    "gemma3n": ("gemma3_text", "its layers have embeddings of their own"),
    "gemma3n_text": ("gemma3_text", "its layers have embeddings of their own"),
    "glm4_moe": ("glm4", _EXPERTS),
    "gpt2": ("llama", f"it has learnt positions, and {_NO_GATE}"),
    "gpt_bigcode": ("llama", f"it has learnt positions, and {_NO_GATE}"),
    "gpt_neox": ("llama", f"it has layer norms with biases, and {_NO_GATE}"),
    "gpt_oss": ("mistral", f"its attention has sinks, and {_EXPERTS}"),
    "gptj": ("cohere", _NO_GATE),
    "granitemoe": ("granite", _EXPERTS),
    "granitemoehybrid": ("granite", "some of its layers are state-space layers"),
    "hunyuan_v1_dense": ("qwen3", "it norms query and key heads after their rotation"),
    "llama4": ("llama", f"it attends to chunks, and {_EXPERTS}"),
    "llama4_text": ("llama", f"it attends to chunks, and {_EXPERTS}"),
    "mixtral": ("mistral", _EXPERTS),
    "mllama": ("llama", _IMAGES),
    "mpt": ("llama", f"it has no rotary embedding, and {_NO_GATE}"),
    "nemotron": ("llama", _NO_GATE),
    "olmo": ("llama", "its norms have no weights"),
    "olmoe": ("olmo2", _EXPERTS),
    "opt": ("llama", f"it has learnt positions, and {_NO_GATE}"),
    "phi": ("cohere", f"its norms have biases, and {_NO_GATE}"),
    "phi4_multimodal": ("phi3", "its tensors have adapters for images and sound"),
    "phimoe": ("phi3", _EXPERTS),
    "qwen2_moe": ("qwen2", _EXPERTS),
    "qwen3_5": ("qwen3", "some of its layers are linear attention"),
    "qwen3_moe": ("qwen3", _EXPERTS),
    "qwen3_next": ("qwen3", f"some of its layers are linear attention, and {_EXPERTS}"),
    "stablelm": ("llama", "its norms are layer norms with biases"),
    "starcoder2": ("llama", f"it has layer norms with biases, and {_NO_GATE}"),
}
