"""The decoder's config, against transformers' own config classes, which need no torch."""

import dataclasses
from typing import Any

import pytest
import transformers

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Block
from ngc_jax.models.config import ROLES, DecoderConfig, block_name, text_config
from ngc_jax.models.rope import Rope
from tests.models.published import PUBLISHED

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def read(architecture: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({"model_type": architecture, **SIZES, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_takes_them_for(name: str) -> None:
    raw, _ = PUBLISHED[name]
    config = DecoderConfig.from_hf(raw)
    # A config class takes over the dictionaries that it is given.
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in text_config(raw).items()}
    theirs = transformers.AutoConfig.for_model(**settings)
    heads = theirs.num_attention_heads
    assert config.architecture == theirs.model_type
    assert config.vocab_size == theirs.vocab_size
    assert config.embed_dim == theirs.hidden_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == heads
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // heads)
    assert config.mlp_dim == theirs.intermediate_size
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_length == theirs.max_position_embeddings
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.activation == getattr(theirs, "hidden_activation", getattr(theirs, "hidden_act", None))
    layer_types = getattr(theirs, "layer_types", None)
    if layer_types is None:
        layer_types = [
            "sliding_attention" if config.architecture == "mistral" else "full_attention"
        ] * theirs.num_hidden_layers
    for kind, window, rope in zip(layer_types, config.windows, config.ropes, strict=True):
        assert window == (theirs.sliding_window if kind == "sliding_attention" else None)
        parameters = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        assert (rope.theta, rope.rope_type) == (parameters["rope_theta"], parameters["rope_type"])
        assert rope.factor == parameters.get("factor", 1.0)
    if config.architecture == "gemma3_text":
        assert config.attention_scale == theirs.query_pre_attn_scalar**-0.5
        assert config.embed_scale == theirs.hidden_size**0.5
    else:
        assert config.attention_scale == config.head_dim**-0.5
        assert config.embed_scale == 1.0


@pytest.mark.parametrize(
    ("architecture", "biases", "settings"),
    [
        ("llama", "", {}),
        ("llama", "qkvo", {"attention_bias": True}),
        ("llama", "ugd", {"mlp_bias": True}),
        ("mistral", "", {}),
        ("qwen2", "qkv", {}),
        ("qwen2", "qkv", {"attention_bias": True}),
        ("qwen3", "", {}),
        ("qwen3", "qkvo", {"attention_bias": True}),
        ("gemma3_text", "qkvo", {"attention_bias": True}),
    ],
)
def test_which_blocks_have_biases(architecture: str, biases: str, settings: dict[str, Any]) -> None:
    blocks = read(architecture, **settings).blocks()
    assert {block.name.rpartition(".")[2] for block in blocks if block.bias} == set(biases)


def test_blocks() -> None:
    config = read("llama", head_dim=10, num_hidden_layers=2)
    shapes = {"q": (60, 24), "k": (20, 24), "v": (20, 24), "o": (24, 60), "u": (34, 24), "g": (34, 24), "d": (24, 34)}
    expected = [
        Block(f"layers.{layer}.{'attn' if role in 'qkvo' else 'mlp'}.{role}", *shapes[role])
        for layer in range(2)
        for role in "qkvougd"
    ]
    assert list(config.blocks()) == expected
    assert "".join(block.name[-1] for block in expected[:7]) == ROLES
    assert block_name(3, "d") == "layers.3.mlp.d"


@pytest.mark.parametrize(
    ("architecture", "settings", "windows"),
    [
        ("llama", {"sliding_window": 8}, (None,) * 5),
        ("mistral", {"sliding_window": 8}, (8,) * 5),
        ("mistral", {}, (4096,) * 5),
        ("mistral", {"sliding_window": None}, (None,) * 5),
        ("qwen2", {"sliding_window": 8}, (None,) * 5),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None,) * 3 + (8, 8)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 5),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True}, (None,) * 5),  # 28 layers without a window
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3,
            },
            (8, 8, None, None, None),
        ),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8, None, 8)),
        ("gemma3_text", {"num_hidden_layers": 7}, (4096,) * 5 + (None, 4096)),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["full_attention"] * 5}, (None,) * 5),
    ],
)
def test_windows(architecture: str, settings: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(architecture, **settings).windows == windows


def test_gemmas_sliding_layers_have_the_local_rope() -> None:
    old = {"rope_theta": 700.0, "rope_local_base_freq": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    }
    full, local = Rope(700.0, "linear", 3.0), Rope(50.0)
    for settings in (old, new):
        config = read("gemma3_text", sliding_window_pattern=3, **settings)
        assert config.ropes == (local, local, full, local, local)
    assert read("gemma3_text", sliding_window_pattern=3).ropes[1:3] == (Rope(1e4), Rope(1e6))


def test_what_silence_means() -> None:
    config = read("llama", num_key_value_heads=None)
    assert (config.num_kv_heads, config.head_dim, config.activation) == (6, 4, "silu")
    assert not config.tied_embeddings
    assert config.ropes[0] == Rope(10_000.0)
    assert read("qwen3").head_dim == 128
    gemma = DecoderConfig.from_hf(PUBLISHED["Gemma 3 4B, text"][0])
    assert (gemma.num_heads, gemma.num_kv_heads, gemma.head_dim, gemma.vocab_size) == (8, 4, 256, 262_208)
    assert gemma.tied_embeddings
    assert (gemma.unit_offset_norm, gemma.post_norms, gemma.qk_norm) == (True, True, "head")


def test_text_part_of_a_multimodal_config() -> None:
    raw, _ = PUBLISHED["Gemma 3 4B, text"]
    assert text_config(raw) == {**raw["text_config"], "architectures": ["Gemma3ForCausalLM"]}
    other = {"model_type": "llama", **SIZES}
    assert text_config(other) is other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt1"}, "architecture 'gpt1' (model_type in config.json) is not supported; expected one of "),
        (
            {"model_type": "deepseek_v3"},
            "architecture 'deepseek_v3' (model_type in config.json) is not supported; its nearest ",
        ),
        ({"model_type": None}, "architecture None (model_type in config.json) is not supported; expected one of "),
        ({"model_type": "gemma3"}, "architecture 'gemma3' (model_type in config.json) is not supported"),
        ({"vocab_size": None}, "vocab_size in config.json is None; expected a positive whole number"),
        ({"hidden_size": 24.5}, "hidden_size in config.json is 24.5; expected a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers in config.json is True; expected a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0; expected a positive whole number"),
        ({"intermediate_size": "34"}, "intermediate_size in config.json is '34'; expected a positive whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json is None; expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in config.json is nan; expected a positive number"),
        ({"num_key_value_heads": -2}, "num_key_value_heads in config.json is -2; expected a positive whole number"),
        ({"num_key_value_heads": 4}, "6 heads do not divide among 4 key-value heads"),
        ({"head_dim": 5}, "head_dim is 5; rotary embeddings need an even number"),
        ({"num_attention_heads": 48}, "head_dim in config.json is 0; expected a positive whole number"),
        ({"hidden_act": "swish"}, "activation 'swish' is not supported; expected one of silu, gelu"),
        ({"rope_theta": -1}, "rope_theta in config.json is -1; expected a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic' is not supported; expected one of "),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' lacks factor; add to rope_parameters in "),
        (
            {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 4},
            "layer_types in config.json has 4 entries of full_attention; expected 5 of sliding_attention or ",
        ),
        (
            {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 4 + ["mamba"]},
            "layer_types in config.json has 5 entries of full_attention, mamba; expected 5 of sliding_attention",
        ),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window in config.json is None; expected a "),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "bidirectional attention is not supported",
        ),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar in config.json is 0; "),
        ({"model_type": "gemma3_text", "final_logit_softcapping": -3}, "final_logit_softcapping in config.json is -3"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
            "max_window_layers in config.json is None; expected a whole number",
        ),
    ],
)
def test_errors_name_the_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        DecoderConfig.from_hf({"model_type": "llama", **SIZES, **changes})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [*SIZES])
def test_sizes_are_not_guessed(name: str) -> None:
    raw = {"model_type": "llama", **SIZES}
    del raw[name]
    if name in ("num_key_value_heads", "max_position_embeddings"):
        DecoderConfig.from_hf(raw)
    else:
        with pytest.raises(UsageError, match=f"^{name} in config.json is None; expected a positive"):
            DecoderConfig.from_hf(raw)


def test_a_config_is_checked_however_it_is_made() -> None:
    config = read("llama")
    for changes in ({"embed_dim": 0}, {"windows": (None,)}, {"ropes": ()}, {"activation": "tanh"}, {"head_dim": 3}):
        with pytest.raises(UsageError):
            dataclasses.replace(config, **changes)


def test_configs_are_values() -> None:
    """Decoders are static arguments of compiled functions: equal configs must hash alike."""
    assert read("gemma3_text") == read("gemma3_text")
    assert hash(read("gemma3_text")) == hash(read("gemma3_text"))
    assert read("llama") != read("llama", hidden_act="gelu")
