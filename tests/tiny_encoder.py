"""A tiny random image encoder that tests share; every dimension has a size of its own."""

import dataclasses

import jax
import numpy as np

from ngc_jax.models.vision import VisionModel, make_encoder

HF_ENCODERS = {
    "vit": {
        "model_type": "vit",
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "image_size": 12,
        "patch_size": 4,
        "num_labels": 5,
        "layer_norm_eps": 1e-5,
    }
}
HF_ENCODERS["dinov2"] = {**HF_ENCODERS["vit"], "model_type": "dinov2", "architectures": ["Dinov2Model"], "mlp_ratio": 2}
HF_ENCODERS["deit"] = {**HF_ENCODERS["vit"], "model_type": "deit"}
HF_ENCODERS["siglip_vision_model"] = {**HF_ENCODERS["vit"], "model_type": "siglip_vision_model"}


def tiny_encoder(family: str = "vit", seed: int = 0) -> VisionModel:
    """A dense encoder whose parameters are all random."""
    made = make_encoder("tiny", HF_ENCODERS[family])
    generator = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + (0.1 * generator.standard_normal(leaf.shape)).astype(np.float32), made.params
    )
    return dataclasses.replace(made, params=jax.tree.map(jax.numpy.asarray, params))


def tiny_images(count: int, seed: int = 0, size: int = 12) -> np.ndarray:
    """(count, 3, size, size) float32 images of a few random patterns and noise."""
    generator = np.random.default_rng(seed)
    patterns = generator.standard_normal((4, 3, size, size))
    weights = generator.standard_normal((count, 4))
    noise = 0.3 * generator.standard_normal((count, 3, size, size))
    return (np.einsum("np,pchw->nchw", weights, patterns) + noise).astype(np.float32)
