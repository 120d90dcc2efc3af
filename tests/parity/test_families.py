"""The contract of every family: what transformers computes is computed here, and written for it."""

import dataclasses
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402

import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from ngc_jax.errors import UsageError  # noqa: E402
from ngc_jax.exporting import export_grouped, export_huggingface  # noqa: E402
from ngc_jax.models.decoder import Decoder  # noqa: E402
from ngc_jax.models.families import FAMILIES  # noqa: E402
from ngc_jax.models.generate import generate  # noqa: E402
from ngc_jax.models.inference import inference_model  # noqa: E402
from ngc_jax.models.load import LanguageModel, load_model  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.models.sources import open_source  # noqa: E402
from tests.models.compact import compact_plan, random_params  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402

TOLERANCE = 1e-4
# The richest case of every family, whose head is not tied: random tied models repeat themselves.
RICH = {"llama": "llama biases", "mistral": "mistral", "qwen2": "qwen2 sliding", "qwen3": "qwen3 sliding"}
RICH = {family: family for family in FAMILIES} | RICH | {"gemma3_text": "gemma3 biases"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, LanguageModel, Path]:
    """A model of a family by transformers and by us, and its directory."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = tiny.torch_model(RICH[request.param])
    theirs.save_pretrained(directory)
    tiny_tokenizer().save(directory)
    return theirs, load_model(str(directory)), directory


def test_logits(pair) -> None:
    theirs, ours, _ = pair
    tokens = tiny.some_tokens()
    expected = tiny.torch_logits(theirs, tokens)
    assert expected.std() > 0.5  # or 1e-4 would say little
    worst = float(np.abs(tiny.our_logits(ours, tokens) - expected).max())
    if file := os.environ.get("NGC_PARITY_ERRORS"):
        errors = json.loads(Path(file).read_text()) if Path(file).exists() else {}
        Path(file).write_text(json.dumps({**errors, ours.config.architecture: float(f"{worst:.0e}")}, indent=1) + "\n")
    assert worst < TOLERANCE


def test_greedy_continuation_with_a_cache(pair) -> None:
    """In the run-time layout; the continuation outgrows the windows, and the cache with it."""
    theirs, ours, _ = pair
    prompts, new = tiny.some_tokens()[:, :5], 24
    given = torch.tensor(prompts, dtype=torch.long)
    continued = theirs.generate(given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = continued[:, prompts.shape[1] :].numpy()
    assert len(np.unique(expected)) > 5
    found = generate(inference_model(ours), list(prompts), max_new_tokens=new, stop_tokens=())
    np.testing.assert_array_equal(np.stack(found), expected)


def test_what_is_saved_is_the_same_file(pair, tmp_path) -> None:
    theirs, ours, directory = pair
    save_model(ours, tmp_path / "again")
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name])
    tokens = tiny.some_tokens()
    again = tiny.torch_logits(tiny.torch_load(tmp_path / "again"), tokens)
    np.testing.assert_array_equal(again, tiny.torch_logits(theirs, tokens))


@pytest.fixture
def compact(pair) -> LanguageModel:
    """A model of the family with groups of every kernel, some of them across layers."""
    _, ours, _ = pair
    plan = compact_plan(ours.config)
    params = random_params(Decoder(ours.config, plan))
    return dataclasses.replace(ours, plan=plan, params=params, load_tokenizer=tiny_tokenizer)


def test_latent_caches_and_the_run_time_layout(compact) -> None:
    """Groups in every layout continue a prompt in the same way; the last compares with a pass without a cache."""
    (prompt,), new = tiny.some_tokens()[:1, :5], 16
    kinds = [dataclasses.replace(compact, cache=kind) for kind in ("full", "latent", "auto")]
    found = [generate(model, [prompt], max_new_tokens=new, stop_tokens=())[0] for model in kinds]
    found.append(generate(inference_model(compact), [prompt], max_new_tokens=new, stop_tokens=())[0])
    whole = np.concatenate([prompt, found[0]])[None]
    logits = tiny.our_logits(compact, whole.astype(np.int32))[0]
    expected = logits[len(prompt) - 1 : -1].argmax(-1)
    for continuation in found:
        np.testing.assert_array_equal(continuation, expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["hf", "hf-grouped"])
def test_exports_in_transformers(compact, grouped, tmp_path) -> None:
    directory = save_model(compact, tmp_path / "model")
    if grouped and compact.config.experts is not None:
        with open_source(str(directory)) as source, pytest.raises(UsageError, match="mixtures of experts"):
            export_grouped(source, tmp_path / "hf")
        return
    with open_source(str(directory)) as source:
        (export_grouped if grouped else export_huggingface)(source, tmp_path / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf",
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        trust_remote_code=grouped,
        **tiny.loops(compact.config.architecture),
    )
    assert not any(report.values()), report
    tokens, ours = tiny.some_tokens(), load_model(str(directory))
    assert ours.plan == compact.plan
    logits = tiny.our_logits(ours, tokens)
    np.testing.assert_allclose(tiny.torch_logits(theirs.eval(), tokens), logits, rtol=0, atol=TOLERANCE)
    if not grouped:
        np.testing.assert_allclose(tiny.our_logits(load_model(str(tmp_path / "hf")), tokens), logits, atol=TOLERANCE)
