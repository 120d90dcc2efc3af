"""The key table: which tensor fills which parameter, and what is said of tensors that do not fit."""

from collections.abc import Callable, Mapping

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.keys import hf_name, match_tensors
from tests.tiny import HF_CONFIGS

Shapes = dict[str, tuple[int, ...]]

UNTIED = DecoderConfig.from_hf(HF_CONFIGS["llama_untied"])
GEMMA = DecoderConfig.from_hf(HF_CONFIGS["gemma3"])
PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "embed.embedding": (59, 24),
    "layers.0.attn.q.kernel": (40, 24),
    "layers.0.attn.q.bias": (40,),
    "layers.0.attn_norm.scale": (24,),
    "layers.12.mlp.d.kernel": (24, 36),
    "norm.scale": (24,),
    "unembed.kernel": (59, 24),
    "groups.0-qk.input_states": (24, 5),
    "groups.0-qk.output_states.layers.1.attn.q": (40, 5),
}
TENSORS: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (59, 24),
    "model.layers.0.self_attn.q_proj.weight": (40, 24),
    "model.layers.0.self_attn.q_proj.bias": (40,),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.layers.12.mlp.down_proj.weight": (24, 36),
    "model.norm.weight": (24,),
    "lm_head.weight": (59, 24),
    "groups.0-qk.input_states": (24, 5),
    "groups.0-qk.output_states.layers.1.attn.q": (40, 5),
}
TABLE = dict(zip(PARAMETERS, TENSORS, strict=True))


def match(tensors: Mapping[str, tuple[int, ...]], parameters: Mapping[str, tuple[int, ...]] = PARAMETERS) -> dict:
    return match_tensors(parameters, tensors, UNTIED, "some/model")


def test_names() -> None:
    for parameter, tensor in TABLE.items():
        assert hf_name(parameter, UNTIED) == tensor
    roles = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    for role, name in roles.items():
        assert hf_name(f"layers.3.attn.{role}.kernel", UNTIED) == f"model.layers.3.self_attn.{name}.weight"
    for role, name in {"u": "up_proj", "g": "gate_proj", "d": "down_proj"}.items():
        assert hf_name(f"layers.3.mlp.{role}.bias", UNTIED) == f"model.layers.3.mlp.{name}.bias"


@pytest.mark.parametrize(
    ("config", "norms"),
    [
        (UNTIED, {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
        (
            GEMMA,
            {
                "attn_norm": "input_layernorm",
                "attn_post_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
                "attn.q_norm": "self_attn.q_norm",
                "attn.k_norm": "self_attn.k_norm",
            },
        ),
    ],
)
def test_names_of_norms(config: DecoderConfig, norms: Mapping[str, str]) -> None:
    for ours, theirs in norms.items():
        assert hf_name(f"layers.7.{ours}.scale", config) == f"model.layers.7.{theirs}.weight"


def test_parameters_that_a_decoder_has_not() -> None:
    with pytest.raises(KeyError):
        hf_name("layers.0.attn_post_norm.scale", UNTIED)
    with pytest.raises(KeyError):
        hf_name("layers.0.attn.z.kernel", UNTIED)


def test_a_file_that_fits() -> None:
    assert match(TENSORS) == TABLE


@pytest.mark.parametrize(
    "prefixed",
    [
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: name.replace("lm_head", "model.language_model.lm_head"),
    ],
)
def test_prefixes_of_multimodal_files(prefixed: Callable[[str], str]) -> None:
    shared = {name: shape for name, shape in TENSORS.items() if not name.startswith("groups.")}
    parameters = {name: shape for name, shape in PARAMETERS.items() if not name.startswith("groups.")}
    found = match({prefixed(name): shape for name, shape in shared.items()}, parameters)
    assert found == {parameter: prefixed(TABLE[parameter]) for parameter in parameters}


def test_tensors_that_are_not_needed() -> None:
    unneeded: Shapes = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (5,),
        "vision_tower.vision_model.embeddings.patch_embedding.bias": (7,),
        "model.vision_tower.post_layernorm.weight": (7,),
        "multi_modal_projector.mm_soft_emb_norm.weight": (7,),
    }
    assert match({**TENSORS, **unneeded}) == TABLE


def test_a_tied_model_may_repeat_its_embedding() -> None:
    tied = {name: shape for name, shape in PARAMETERS.items() if name != "unembed.kernel"}
    assert "lm_head.weight" not in match(TENSORS, tied).values()


def test_an_untied_model_needs_its_unembedding() -> None:
    tensors = {name: shape for name, shape in TENSORS.items() if name != "lm_head.weight"}
    with pytest.raises(UsageError, match=r"config\.json: missing lm_head\.weight\. Download"):
        match(tensors)


def test_all_that_does_not_fit_is_named_at_once() -> None:
    tensors = dict(TENSORS)
    del tensors["model.norm.weight"]
    tensors["model.layers.12.mlp.down_proj.weight"] = (36, 24)
    tensors["model.layers.0.self_attn.q_proj.scales"] = (40, 3)
    with pytest.raises(UsageError) as raised:
        match(tensors)
    assert str(raised.value) == (
        "the tensors of some/model do not fit its config.json: missing model.norm.weight; "
        "misshapen model.layers.12.mlp.down_proj.weight is (36, 24), expected (24, 36); "
        "left over model.layers.0.self_attn.q_proj.scales. Download the whole model again"
    )


def test_did_you_mean() -> None:
    tensors = dict(TENSORS)
    tensors["model.layers.0.input_layer_norm.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    with pytest.raises(UsageError) as raised:
        match(tensors)
    assert (
        "missing model.layers.0.input_layernorm.weight (did it mean model.layers.0.input_layer_norm.weight?); "
        "left over model.layers.0.input_layer_norm.weight."
    ) in str(raised.value)


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(UsageError, match=r"misshapen model\.norm\.weight is \(24, 1\), expected \(24,\)"):
        match({**TENSORS, "model.norm.weight": (24, 1)})


def test_long_lists_are_cut_short() -> None:
    with pytest.raises(UsageError) as raised:
        match({})
    message = str(raised.value)
    assert message.count("model.") == 6  # 8 of 9 are named, of which these begin with model.
    assert "and 1 more." in message
    assert "\n" not in message


def test_a_tensor_that_is_there_under_two_names_is_left_over() -> None:
    with pytest.raises(UsageError, match=r"json: left over language_model\.model\.norm\.weight\. Download"):
        match({**TENSORS, "language_model.model.norm.weight": (24,)})


@pytest.mark.parametrize(
    "prefixed",
    [
        lambda name: name.removeprefix("model."),  # a decoder saved without its head
        lambda name: f"_orig_mod.{name}",  # torch.compile
        lambda name: f"module.{name}",  # DataParallel
        lambda name: f"base_model.model.{name}",  # peft
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
)
def test_prefixes_of_wrappers(prefixed: Callable[[str], str]) -> None:
    tensors = {name if name.startswith("groups.") else prefixed(name): shape for name, shape in TENSORS.items()}
    found = match(tensors)
    assert {tensor: parameter for parameter, tensor in found.items()}.keys() == tensors.keys()
    assert found["layers.12.mlp.d.kernel"] == prefixed("model.layers.12.mlp.down_proj.weight")


def test_a_name_with_and_without_its_prefix_is_ambiguous() -> None:
    with pytest.raises(UsageError, match=r"left over norm\.weight"):
        match({**TENSORS, "norm.weight": (24,)})


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"base_model.model.{name}",  # peft
        lambda name: f"module.{name}",  # DataParallel
        lambda name: f"policy.{name}",  # a program's own
        lambda name: name.replace("model.", "model.model.", 1),
        lambda name: name.replace("model.", "llm.", 1),
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("lm_head", "model.lm_head"),
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_what_stands_before_all_names_is_taken_away(wrapped: Callable[[str], str]) -> None:
    shared = {name: shape for name, shape in TENSORS.items() if not name.startswith("groups.")}
    parameters = {name: shape for name, shape in PARAMETERS.items() if not name.startswith("groups.")}
    found = match({wrapped(name): shape for name, shape in shared.items()}, parameters)
    assert found == {parameter: wrapped(TABLE[parameter]) for parameter in parameters}


def test_of_two_models_in_one_file_none_is_chosen() -> None:
    for other in ("ema.", "ema.model."):
        second = {f"{other}{name.removeprefix('model.')}": shape for name, shape in TENSORS.items()}
        with pytest.raises(UsageError, match=rf"left over {other}embed_tokens\.weight, "):
            match({**TENSORS, **second})
    second = {name.removeprefix("model."): shape for name, shape in TENSORS.items() if name.startswith("model.")}
    with pytest.raises(UsageError, match=r"left over embed_tokens\.weight, "):
        match({**TENSORS, **second})


def test_a_tied_model_may_have_its_embedding_under_the_name_of_its_head() -> None:
    config = DecoderConfig.from_hf(HF_CONFIGS["llama"])
    tied = {name: shape for name, shape in PARAMETERS.items() if name != "unembed.kernel"}
    tensors = {name: shape for name, shape in TENSORS.items() if name != "model.embed_tokens.weight"}
    assert match_tensors(tied, tensors, config, "it")["embed.embedding"] == "lm_head.weight"
    with pytest.raises(UsageError, match=r"missing model\.embed_tokens\.weight"):
        match(tensors)
