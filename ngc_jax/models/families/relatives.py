"""What is known of architectures that are not supported: the nearest supported one, and the difference."""

from __future__ import annotations

_EXPERTS = "its MLPs are mixtures of experts"
_IMAGES = "some of its layers attend to images"
_LATENT = "its keys and values are read from a latent vector of their own, and its MLPs are mixtures of experts"

# model_type -> (the nearest family, the difference).
RELATIVES: dict[str, tuple[str, str]] = {
    "apertus": ("nemotron", "its activation, xIELU, has parameters"),
    "bloom": ("starcoder2", "its positions are biases of attention (ALiBi)"),
    "cohere2_vision": ("cohere2", "it is multimodal; its text decoder is not read"),
    "deepseek_v2": ("llama", _LATENT),
    "deepseek_v3": ("llama", _LATENT),
    "exaone_moe": ("exaone4", _EXPERTS),
    "falcon": ("starcoder2", "q, k and v are fused head by head, and attention and MLP are in parallel"),
    "gemma3n": ("gemma3_text", "its layers have embeddings of their own"),
    "gemma3n_text": ("gemma3_text", "its layers have embeddings of their own"),
    "glm4_moe": ("glm4", f"{_EXPERTS}, one of which reads every token"),
    "gpt2": ("starcoder2", "its positions are learnt"),
    "gpt_bigcode": ("starcoder2", "its positions are learnt"),
    "gpt_neox": (
        "starcoder2",
        "q, k and v are fused head by head, and attention and MLP in parallel have norms of their own",
    ),
    "gpt_oss": ("mixtral", "its attention has sinks, and its experts have biases and an activation of their own"),
    "gptj": ("starcoder2", "attention and MLP are in parallel, and its head has a bias"),
    "granitemoehybrid": ("granite", "some of its layers are state-space layers"),
    "hunyuan_v1_dense": ("qwen3", "it norms query and key heads after their rotation"),
    "llama4": ("llama", f"it attends to chunks, and {_EXPERTS}"),
    "llama4_text": ("llama", f"it attends to chunks, and {_EXPERTS}"),
    "mllama": ("llama", _IMAGES),
    "mpt": ("starcoder2", "its positions are biases of attention (ALiBi)"),
    "olmo": ("llama", "its norms have no weights"),
    "opt": ("starcoder2", "its positions are learnt"),
    "phi": ("stablelm", "its MLPs have no gate, and its head has a bias"),
    "phi4_multimodal": ("phi3", "its tensors have adapters for images and sound"),
    "phimoe": ("mixtral", "its router takes one expert after the other"),
    "qwen2_moe": ("qwen3_moe", "one of its experts reads every token"),
    "qwen3_5": ("qwen3", "some of its layers are linear attention"),
    "qwen3_next": ("qwen3", f"some of its layers are linear attention, and {_EXPERTS}"),
}
