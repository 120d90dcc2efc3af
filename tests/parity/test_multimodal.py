"""The text decoders of multimodal models, as transformers saves them, give the logits of the whole model for text."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402

import transformers  # noqa: E402

from ngc_jax.models.load import load_model  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402

VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXTRAL = {**VISION, "image_size": 28, "patch_size": 14, "head_dim": 8}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14}
# Pairs of dimensions for time, height and width.
MROPE = {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [2, 1, 1]}
TEXT = {**tiny._SIZES, "hidden_size": 48, "rope_parameters": MROPE}
QWEN2 = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
BEYOND = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
# Type of the whole model -> (that of its text decoder as a model of its own, configs of the parts).
MODELS = {
    "qwen2_vl": ("qwen2", {**TEXT, **QWEN2}, {"depth": 1, "embed_dim": 16, "hidden_size": 48, "num_heads": 2}),
    "qwen2_5_vl": ("qwen2", {**TEXT, **QWEN2}, {**QWEN, "fullatt_block_indexes": [0]}),
    "qwen3_vl": ("qwen3", {**TEXT, "head_dim": 8}, {**QWEN, "deepstack_visual_indexes": [0]}),
    "mistral3": ("ministral3", {**tiny.CASES["ministral3"][1], **tiny._SIZES, "model_type": "ministral3"}, PIXTRAL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_text_logits(kind: str, tmp_path: Path) -> None:
    own_type, text, vision = MODELS[kind]
    beyond = {"image_token_index": 90} if kind == "mistral3" else BEYOND
    config = transformers.AutoConfig.for_model(
        kind, text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=False, **beyond
    )
    theirs = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    theirs.config.tie_word_embeddings = False
    tiny.randomise(theirs)
    theirs.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save(tmp_path / "whole")
    tokens = tiny.some_tokens()
    expected = tiny.torch_logits(theirs, tokens)
    ours = load_model(str(tmp_path / "whole"))
    assert ours.config.architecture == own_type
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), expected, rtol=0, atol=1e-4)
    again = tiny.torch_load(save_model(ours, tmp_path / "text"))
    assert again.config.model_type == own_type
    np.testing.assert_allclose(tiny.torch_logits(again, tokens), expected, rtol=0, atol=1e-4)
