"""The tokenizer's rule for what comes before a text, and prompts in the forms that people try."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors
from transformers import AutoTokenizer

from ngc_jax.errors import UsageError
from ngc_jax.models.generate import as_prompts, generate, stream_text
from ngc_jax.models.tokenizer import Tokenizer, wrap
from tests.test_tokens import bos_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("backend", [models.WordLevel({"<s>": 0, "cat": 1}), models.BPE({"<s>": 0, "c": 1}, [])])
def test_no_letter_has_to_be_in_the_vocabulary(backend, ending):
    made = Backend(backend)
    made.add_special_tokens(["<s>"])
    assert wrap(made, special_tokens={"bos_token": "<s>"}, add_bos=True, add_eos=ending).prefix() == (0,)
    assert wrap(made, special_tokens={"bos_token": "<s>", "eos_token": "<s>"}, add_eos=ending).prefix() == ()


def test_a_text_that_cannot_be_encoded_is_refused():
    tokenizer = wrap(Backend(models.WordLevel({"cat": 1})), special_tokens={})
    for use in (lambda: tokenizer.encode("dog"), tokenizer.prefix):
        with pytest.raises(UsageError, match="Missing"):
            use()


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("processor", [True, False])
def test_the_rule_is_that_of_transformers(tmp_path, add_bos, processor):
    made = Backend(models.WordLevel({"<s>": 0, "a": 1}))
    made.add_special_tokens(["<s>"])
    if processor:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {} if add_bos is None else {"add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))("a").input_ids
    assert [*Tokenizer.load(tmp_path).prefix(), 1] == theirs


def test_prompts_are_taken_in_any_form():
    model = dataclasses.replace(tiny_model(), load_tokenizer=bos_tokenizer)
    encoded = bos_tokenizer().encode_prompt("Hi")
    for given in ("Hi", ["Hi"], encoded, encoded[None], encoded.tolist(), [encoded[None]], jnp.asarray(encoded)):
        (prompt,) = as_prompts(model, given)
        np.testing.assert_array_equal(prompt, encoded)
    assert [prompt.tolist() for prompt in as_prompts(model, np.array([[1, 2], [3, 4]]))] == [[1, 2], [3, 4]]
    assert [len(prompt) for prompt in as_prompts(model, ["Hi", [1, 2], encoded])] == [len(encoded), 2, len(encoded)]
    (one,), (other,) = (generate(model, given, max_new_tokens=2) for given in ("Hi", [encoded]))
    np.testing.assert_array_equal(one, other)
    texts = ("".join(stream_text(model, given, bos_tokenizer(), max_new_tokens=2)) for given in ("Hi", encoded))
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "NoneType"),
        (3, "prompts is int"),
        (np.int32(3), "prompts is int32"),
        ([[[1, 2], [3]]], "rows of different lengths"),
        ([np.ones((2, 3), int)], r"shape \(2, 3\)"),
        ([[0.5, 1.0]], "float64 numbers"),
        ("", r"shape \(0,\)"),
        ([], None),
    ],
)
def test_what_is_no_prompt_is_refused(given, message):
    model = dataclasses.replace(tiny_model(), load_tokenizer=tiny_tokenizer)
    if message is None:
        assert generate(model, given, max_new_tokens=2) == []
        return
    with pytest.raises(UsageError, match=message):
        generate(model, given, max_new_tokens=2)
