"""Directories that keep their groups, in transformers: logits, generation by the cache, bfloat16, a new process."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from ngc_jax import UsageError, generate  # noqa: E402
from ngc_jax.exporting import export_grouped  # noqa: E402
from ngc_jax.groups.plan import Block, GroupPlan, Plan  # noqa: E402
from ngc_jax.models.decoder import Decoder  # noqa: E402
from ngc_jax.models.sampling import Sampling  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.models.sources import open_source  # noqa: E402
from tests.exporting.test_export import bpe_tokenizer, model_of  # noqa: E402
from tests.models.compact import fixed_gauge_model, random_params  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402


def exported(model, place, **options):
    model = dataclasses.replace(model, load_tokenizer=bpe_tokenizer)
    with open_source(str(save_model(model, place / "model"))) as source:
        export_grouped(source, place / "hf", **options)
    return place / "hf"


def loaded(directory, dtype=torch.float32):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


# The first four have a bilinear, a riemannian and two lifted groups, some of them across layers.
MODELS = {
    "llama": lambda: model_of("llama"),
    "mistral": lambda: model_of("mistral"),
    "qwen3": lambda: model_of("qwen3"),
    "gemma3": lambda: model_of("gemma3"),
    "biases, pivots, a member narrower than its group": lambda: fixed_gauge_model("qwen2", vocab_size=300),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_we_compute(name, tmp_path):
    ours = MODELS[name]()
    theirs = loaded(exported(ours, tmp_path))
    tokens = tiny.some_tokens()
    logits = tiny.our_logits(ours, tokens)
    np.testing.assert_allclose(tiny.torch_logits(theirs, tokens), logits, rtol=0, atol=1e-4)
    # Factors, not weights: as many numbers as we count, pivots' indices aside.
    assert sum(p.numel() for p in theirs.parameters()) <= ours.count_parameters() + 2 * 24 * 64
    prompt = tokens[0, :9]
    found = theirs.generate(input_ids=torch.tensor(prompt[None]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    (expected,) = generate(
        ours, [prompt], max_new_tokens=12, sampling=Sampling(), key=jax.random.key(0), stop_tokens=()
    )
    assert found[0, 9:].tolist() == list(expected)


def test_bfloat16(tmp_path):
    ours = MODELS["biases, pivots, a member narrower than its group"]()
    theirs = loaded(exported(ours, tmp_path, dtype="bfloat16"), torch.bfloat16)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    tokens = tiny.some_tokens()
    np.testing.assert_allclose(tiny.torch_logits(theirs, tokens), tiny.our_logits(ours, tokens), rtol=0, atol=0.3)


def test_layers_of_different_widths(tmp_path):
    """Where the plan gives one layer's MLP a width of its own: whole blocks, and groups."""
    model = tiny_model("llama")
    config = model.config
    sizes = {"u": (12, config.embed_dim), "g": (12, config.embed_dim), "d": (config.embed_dim, 12)}
    blocks = {role: Block(f"layers.1.mlp.{role}", *sizes[role]) for role in "ugd"}
    plan = Plan((GroupPlan("1-u", (blocks["u"],), 3),), (blocks["g"], blocks["d"]))
    entry = {"groups": [{"rank": 3, "kernel": {"name": "bilinear"}, "pivots": False, "members": [_entry(blocks["u"])]}]}
    entry["dense"] = [_entry(blocks[role]) for role in "gd"]
    whole = dataclasses.replace(model, plan=Plan((GroupPlan("1-u", (config.block(1, "u"),), 3),)))
    whole = dataclasses.replace(whole, params=random_params(Decoder(config, whole.plan)))
    directory = exported(whole, tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    settings["ngc"] = entry
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True, ngc=entry), trust_remote_code=True
    )
    assert plan.keep_ratio() < 1
    mlp = theirs.model.layers[1].mlp
    assert mlp.up_proj.read.weight.shape == (12, 3)
    assert mlp.down_proj.weight.shape == (config.embed_dim, 12)
    assert theirs(input_ids=torch.tensor(tiny.some_tokens(), dtype=torch.long)).logits.isfinite().all()


def _entry(block):
    return {"name": block.name, "shape": [block.d_out, block.d_in], "bias": block.bias}


def test_a_new_process_loads_it_and_without_trust_it_is_refused(tmp_path):
    directory = exported(model_of("llama"), tmp_path)
    program = (
        "import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], "
        "trust_remote_code=sys.argv[2] == 'yes'); "
        "print(type(m).__name__, *(n in sys.modules for n in ['ngc_jax', 'jax']))"
    )

    def run(trust):
        command = [sys.executable, "-c", program, str(directory), trust]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run("yes").stdout.split() == ["NgcForCausalLM", "False", "False"]
    refused = run("no")
    assert refused.returncode != 0
    assert "trust_remote_code=True" in refused.stderr


def test_our_own_directory_is_refused_by_its_type(tmp_path):
    save_model(dataclasses.replace(model_of("llama"), load_tokenizer=bpe_tokenizer), tmp_path / "model")
    with pytest.raises(ValueError, match="model type `ngc`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_model_without_groups_is_refused(tmp_path):
    model = dataclasses.replace(tiny_model("llama"), load_tokenizer=bpe_tokenizer)
    with open_source(str(save_model(model, tmp_path / "model"))) as source, pytest.raises(UsageError, match="to hf"):
        export_grouped(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
