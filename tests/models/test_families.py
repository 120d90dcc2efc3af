"""The records of families: their table, a family of one's own, multimodal configs, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ngc_jax.errors import UsageError
from ngc_jax.exporting import export_gguf
from ngc_jax.models import families
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.families import FAMILIES, Family, support_table, text_config
from ngc_jax.models.families.relatives import RELATIVES
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.training import sharding
from ngc_jax.training.fresh import fresh_model
from tests.pages import DOCS, run_examples
from tests.tiny import HF_CONFIGS, forward, random_tokens, tiny_model, tiny_tokenizer

SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 4, "num_attention_heads": 6}
# Which every family's default number of key-value heads divides.
WIDE = {**SIZES, "hidden_size": 256, "num_attention_heads": 32}
ERRORS = Path(__file__).parents[1] / "parity" / "errors.json"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_record_is_whole(name):
    """Every parameter of its decoder has a name, transformers knows its classes, and fused parts are modules."""
    family = FAMILIES[name]
    assert hasattr(transformers, family.config_class)
    assert getattr(transformers, family.config_class).model_type == name
    assert family.model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    config = DecoderConfig.from_hf({"model_type": name, **WIDE, "rms_norm_eps": 1e-5})
    blocks = config.layer_blocks(0)
    names = {family.hf_name(f"{block.name}.kernel") for block in blocks}
    assert len(names) == len(blocks) >= len(config.roles)
    assert {part for parts in family.stacked.values() for part in parts} <= set(family.modules.values())
    assert {part for parts in family.fused.values() for part in parts} <= set(family.modules.values())
    assert config.architecture == name


@pytest.mark.parametrize("name", FAMILIES)
def test_what_silence_means_is_what_transformers_takes_it_for(name):
    family = FAMILIES[name]
    theirs = getattr(transformers, family.config_class)(**WIDE)
    silent = {"model_type": name, **WIDE}
    if name in ("llama", "mistral", "qwen2", "qwen3"):  # whose every published file has it
        silent |= {"rms_norm_eps": theirs.rms_norm_eps}
    config = DecoderConfig.from_hf(silent)
    assert config.num_kv_heads == (theirs.num_key_value_heads or 32)
    original = 16_384  # of ministral3: above it, queries are scaled
    assert config.max_length == (original if name == "ministral3" else theirs.max_position_embeddings)
    assert config.norm_eps == getattr(theirs, family.eps)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 8)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 4
    assert config.windows == tuple(window if kind == "sliding_attention" else None for kind in types)
    for rope, kind in zip(config.ropes, types, strict=True):
        if rope is not None:
            parameters = theirs.rope_parameters.get(kind, theirs.rope_parameters)
            assert (rope.theta, rope.rope_type) == (parameters["rope_theta"], parameters["rope_type"])
            assert rope.share == parameters.get("partial_rotary_factor", 1.0)


def test_the_page_has_the_table():
    page = (DOCS / "architectures.md").read_text()
    assert support_table(json.loads(ERRORS.read_text())) in page


def test_every_family_was_measured():
    errors = json.loads(ERRORS.read_text())
    assert set(errors) == set(FAMILIES)
    assert max(errors.values()) < 1e-4


def test_the_page_adds_a_family(tmp_path):
    """The record of the page, with a tiny model: its residual multiplier and its norms are in what it computes."""
    try:
        session = run_examples("add-an-architecture.md", least=2)
        assert len((DOCS / "add-an-architecture.md").read_text().splitlines()) <= 60
        config = {**session["sizes"], "model_type": "my_model", "num_key_value_heads": 2}
        tokens = jnp.asarray(random_tokens(12, vocab_size=53))[None]
        model = fresh_model({**config, "residual_multiplier": 1.0}, tiny_tokenizer, jax.random.key(0))
        again = load_model(str(save_model(model, tmp_path / "model")))
        assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["MyForCausalLM"]
        relative = {**again.hf_config, "model_type": "qwen3", "head_dim": 4, "rms_norm_eps": 1e-6}
        same = DecoderConfig.from_hf(relative)
        logits = forward(again.params, tokens, decoder=again.decoder)[0]
        other = again.decoder.clone(config=same)
        np.testing.assert_array_equal(logits, forward(again.params, tokens, decoder=other)[0])
        scaled = DecoderConfig.from_hf({**config, "residual_multiplier": 0.5})
        halved = forward(again.params, tokens, decoder=again.decoder.clone(config=scaled))[0]
        assert np.abs(np.asarray(halved - logits)).max() > 0.1
    finally:
        FAMILIES.pop("my_model", None)


def test_a_type_has_one_family():
    with pytest.raises(UsageError, match="'phi3' has a family"):
        families.register(Family("phi3", "Phi3Config", "Phi3ForCausalLM"))


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_supported_and_refused_ones_are_not(name):
    assert RELATIVES[name][0] in FAMILIES
    assert name not in FAMILIES
    assert name in transformers.CONFIG_MAPPING
    with pytest.raises(UsageError, match=rf"'{name}' .* its nearest supported relative is {RELATIVES[name][0]}: "):
        DecoderConfig.from_hf({"model_type": name, **SIZES})


MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1], "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("outer", "family", "tied"),
    [
        ({"model_type": "qwen2_5_vl", "text_config": {**SIZES, "rope_scaling": MROPE}}, "qwen2", False),
        ({"model_type": "qwen2_vl", **SIZES, "rope_scaling": MROPE, "tie_word_embeddings": True}, "qwen2", True),
        (
            {"model_type": "qwen3_vl", "text_config": {**SIZES, "rope_parameters": MROPE}, "tie_word_embeddings": True},
            "qwen3",
            True,
        ),
        ({"model_type": "mistral3", "text_config": {**WIDE, "rms_norm_eps": 1e-5}}, "mistral", False),
        ({"model_type": "mistral3", "text_config": {**WIDE, "model_type": "ministral3"}}, "ministral3", False),
    ],
)
def test_the_text_decoder_of_a_multimodal_config(outer, family, tied):
    found = text_config(outer)
    config = DecoderConfig.from_hf(outer)
    assert (config.architecture, config.tied_embeddings) == (family, tied)
    assert found["architectures"] == [FAMILIES[family].model_class]
    assert "mrope" not in json.dumps(found)
    assert not config.ropes[0].interleaved
    if "qwen" in family:
        assert config.ropes[0].theta == 500.0


def test_a_text_decoder_that_is_not_supported_is_refused_by_its_name():
    with pytest.raises(UsageError, match="'mistral4'"):
        DecoderConfig.from_hf({"model_type": "mistral3", "text_config": {**SIZES, "model_type": "mistral4"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, r"no_rope_layers in config\.json is \[1, 2\]"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "short_factor"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "1 dimensions of a head are rotated"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor of the rope"),
        ({"model_type": "granite", "residual_multiplier": -1}, "residual_multiplier"),
        ({"model_type": "smollm3", "no_rope_layers": [[1]] * 4}, "no_rope_layers"),
        ({"model_type": "exaone4", "sliding_window_pattern": "", "num_key_value_heads": 2}, "sliding_window_pattern"),
        ({"model_type": "ministral", "layer_types": 3}, r"layer_types in config\.json is 3; expected a list"),
        ({"model_type": "cohere2", "head_dim": 4, "num_attention_heads": 48}, "head_dim is 1"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "mistral3", "text_config": {"model_type": [1]}}, r"architecture \[1\]"),
        (
            {"model_type": "llama", "rms_norm_eps": 1, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial rotary",
        ),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig.from_hf({**SIZES, **settings})


@pytest.mark.parametrize("topology", ["qkv-o-ug-d", "uu-gg", "auto"])
def test_topologies_of_a_decoder_without_a_gate(topology):
    """Written for all roles: the one that it lacks is left out, and groups of nothing else with it."""
    config = DecoderConfig.from_hf(HF_CONFIGS["starcoder2"])
    groups = all_candidates(candidate_cells(config, topology))
    assert {member.name[-1] for group in groups for member in group.members} == set(
        "qkvoud" if topology[:2] != "uu" else "u"
    )
    assert all(group.members and "g" not in group.name for group in groups)
    assert len({group.members for group in groups}) == len(groups)
    with pytest.raises(KeyError):
        config.block(0, "g")


@pytest.mark.parametrize("name", ["starcoder2", "olmo3", "cohere2"])
def test_every_parameter_has_a_place_on_a_mesh(name):
    params = tiny_model(name).params
    found = sharding.params_shardings(params, sharding.make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_gguf_files_of_other_families_are_refused_and_nothing_is_written(tmp_path):
    directory = save_model(tiny_model("starcoder2"), tmp_path / "model")
    with (
        open_source(str(directory)) as source,
        pytest.raises(UsageError, match=r"starcoder2 models cannot .* only those of llama, .*; export it to hf"),
    ):
        export_gguf(source, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fused_tensors_of_the_wrong_size_are_refused(tmp_path):
    model = tiny_model("glm4")
    directory = save_model(model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.gate_up_proj.weight"
    rows = 2 * HF_CONFIGS["glm4"]["intermediate_size"]
    gate_and_up = [np.asarray(model.params["layers"]["1"]["mlp"][role]["kernel"]) for role in "gu"]
    np.testing.assert_array_equal(tensors[name], np.concatenate(gate_and_up))
    save_file({**tensors, name: tensors[name][1:]}, directory / "model.safetensors")
    with pytest.raises(UsageError, match=rf"'{name}' of .* is \({rows - 1}, 24\), expected {rows} rows"):
        open_source(str(directory))
