"""Training from scratch and planning of memory, by the command line."""

import json
from functools import partial

import jax
import pytest

from ngc_jax import cli
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.training import sharding
from ngc_jax.training.fit import TrainConfig
from ngc_jax.training.fresh import uniform_plan
from ngc_jax.training.memory import plan_memory
from tests.models.compact import dense_model
from tests.models.published import PUBLISHED
from tests.tiny import HF_CONFIGS

ARCHITECTURE = (
    "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("train")
    save_model(dense_model("llama", num_hidden_layers=1), place / "dense")
    (place / "text.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 60)
    return place


def run(place, out, *flags):
    command = ["train", "--tokenizer", str(place / "dense"), "--architecture", ARCHITECTURE, "--out", str(place / out)]
    command += ["--text", str(place / "text.txt"), "--evaluation-text", str(place / "text.txt"), "--batch-size", "8"]
    command += ["--evaluation-tokens", "512", "--sequence-length", "32", "--learning-rate", "1e-2", "--steps", "25"]
    code = cli.main([*command, "--json", str(place / "summary.json"), *flags])
    return code, json.loads((place / "summary.json").read_text()) if code == 0 else {}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--topology", "qkv-o-ug-d", "--keep", "0.6"],
        ["--topology", "qq-kk-vv-o-uu-gg-d", "--rank", "8", "--kernel", "lifted", "--lift", "16"],
        pytest.param(
            ["--topology", "qkv-o-ug-d", "--keep", "0.7", "--kernel", "riemannian", "--metric-rank", "2"],
            marks=pytest.mark.slow,
        ),
        ["--topology", "qkv-o-ug-d", "--keep", "0.6", "--iterations", "2"],
    ],
    ids=["dense", "bilinear", "lifted", "riemannian", "unrolled"],
)
def test_models_learn_from_scratch(place, flags, monkeypatch):
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})
    if flags:  # the first on all devices, the others on one: a program for eight takes longer to compile
        monkeypatch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
    name = "-".join(flags) or "dense"
    code, summary = run(place, name, *flags)
    assert code == 0
    start, end = (summary["perplexities"][step] for step in ("0", "25"))
    # A signal of unit variance through every layer: the first predictions are near uniform over 259 tokens.
    assert 150 < start < 700
    assert end < 25
    model = load_model(str(place / name / "model"))
    assert model.config.iterations == (2 if "--iterations" in flags else 1)
    assert (model.plan is None) == (not flags)
    if "--keep" in flags:
        assert 0.5 < model.plan.keep_ratio() <= float(flags[flags.index("--keep") + 1])


def test_bad_plans_are_refused(place, capsys):
    assert run(place, "bad", "--keep", "0.5")[0] == 2
    assert "needs a topology" in capsys.readouterr().err
    assert run(place, "bad", "--topology", "qkv", "--keep", "0.5", "--rank", "3")[0] == 2
    assert "not both" in capsys.readouterr().err
    with pytest.raises(UsageError, match="without a rank of 128"):
        uniform_plan(DecoderConfig.from_hf(HF_CONFIGS["llama"]), "qkv", keep=0.5, multiple=128)


@pytest.mark.parametrize(
    ("name", "teacher_gib"),
    [
        ("Llama 3 8B", 8_030_261_248 * 2 / 2**30 / 256),
        pytest.param("Llama 3.1 70B", 70_553_706_496 * 2 / 2**30 / 256, marks=pytest.mark.slow),
    ],
)
def test_full_size_models_fit_a_pod(name, teacher_gib):
    """A student of ranks that a mesh divides, its teacher beside it, on 64 x 4 devices of 16 GiB."""
    config = DecoderConfig.from_hf(PUBLISHED[name][0])
    found = plan_memory(
        config,
        uniform_plan(config, "qkv-o-ug-d", keep=0.5, multiple=128),
        TrainConfig(batch_size=256, sequence_length=2048, trainable="states", dtype="bfloat16"),
        mesh_shape=(1, 64, 4),
        teacher=True,
    )
    parts = found["bytes_per_device"]
    assert found["devices"] == 256
    assert 0.45 * PUBLISHED[name][1] < found["parameters"] < 0.65 * PUBLISHED[name][1]
    # Norms alone are on every device.
    assert teacher_gib <= parts["teacher"] / 2**30 < 1.02 * teacher_gib + 0.002
    adam = found["trained"] * 8
    assert adam / 256 <= parts["optimiser"] < adam / 32
    assert parts["sum"] < 16 * 2**30


def test_memory_as_the_compiler_counts_it(place, capsys):
    """The arguments of the compiled step are the parts that are said to be resident."""
    raw = {**PUBLISHED["SmolLM2 135M"][0], "num_hidden_layers": 2, "vocab_size": 512}
    config = DecoderConfig.from_hf(raw)
    plan = uniform_plan(config, "qkv-o-ug-d", keep=0.5, multiple=8)
    training = TrainConfig(batch_size=8, sequence_length=16, dtype="bfloat16")
    found = plan_memory(config, plan, training, mesh_shape=(2, 4, 1), compile=True)
    parts = found["bytes_per_device"]
    resident = parts["trained parameters, float32"] + parts["optimiser"] + parts["frozen parameters"]
    batch = 4 * 16 * 4
    assert abs(found["compiled_bytes_per_device"]["arguments"] - resident - batch) < 4096
    flags = ["plan-memory", str(place / "dense"), "--topology", "qkv", "--json", str(place / "memory.json")]
    assert cli.main(flags) == 0
    assert "GiB on each device" in capsys.readouterr().out
    assert json.loads((place / "memory.json").read_text())["devices"] == 1
