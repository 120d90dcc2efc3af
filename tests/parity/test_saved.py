"""What we save, transformers loads, and finds in it the numbers that it had itself saved."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402

import transformers  # noqa: E402

from ngc_jax.models import save  # noqa: E402
from ngc_jax.models.load import load_model  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", ["llama biases", "llama yarn", "mistral", "qwen2 sliding", "qwen3 sliding", "gemma3"])
def test_transformers_reads_what_we_save(
    case: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharded:
        monkeypatch.setattr(save, "SHARD_BYTES", 20_000)
    theirs = tiny.torch_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save(tmp_path / "theirs")
    save_model(load_model(str(tmp_path / "theirs")), tmp_path / "ours")
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 2) == sharded
    tokens = tiny.some_tokens()
    np.testing.assert_array_equal(
        tiny.torch_logits(tiny.torch_load(tmp_path / "ours"), tokens), tiny.torch_logits(theirs, tokens)
    )


def test_bfloat16_is_saved_bit_for_bit(tmp_path: Path) -> None:
    tiny.torch_model("qwen3 biases").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save(tmp_path / "theirs")
    save_model(load_model(str(tmp_path / "theirs"), dtype="bfloat16"), tmp_path / "ours")
    before = tiny.torch_load(tmp_path / "theirs", torch.bfloat16).state_dict()
    after = tiny.torch_load(tmp_path / "ours", torch.bfloat16).state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]), name


def test_the_text_part_of_a_multimodal_model_becomes_a_model_of_its_own(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=tiny.torch_config("gemma3"),
        vision_config={
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config)
    tiny.randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save(tmp_path / "theirs")
    save_model(load_model(str(tmp_path / "theirs")), tmp_path / "ours")
    ours = tiny.torch_load(tmp_path / "ours")
    assert isinstance(ours, transformers.Gemma3ForCausalLM)
    language_model = theirs.model.language_model.state_dict()
    assert language_model.keys() == ours.model.state_dict().keys()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, language_model[name]), name
