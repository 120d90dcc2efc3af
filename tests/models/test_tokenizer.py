"""The tokenizer wrapper: loading Hugging Face's files, long texts, ends of generation."""

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import Tokenizer, one_line, wrap
from ngc_jax.models.tokenizer_model import quiet_transformers

with quiet_transformers():
    from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<extra>", "a", "b", "c"]


def backend() -> Backend:
    tokenizer = Backend(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[1:5])
    return tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Tokenizer files as transformers writes them, with a length limit as published ones have."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    limited = backend()
    limited.enable_truncation(4)
    limited.enable_padding(length=6, pad_id=0, pad_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=limited, model_max_length=4, **special)
    fast.save_pretrained(str(tmp_path))
    return tmp_path


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expects a UsageError of one line that says all of `parts`."""
    with pytest.raises(UsageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_text_of_any_length_without_limits_or_warnings(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("a b c a b c a")
    assert ids.dtype == np.int32
    assert ids.tolist() == [5, 6, 7, 5, 6, 7, 5]
    assert tokenizer.encode("a").tolist() == [5]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("").dtype == np.int32
    assert tokenizer.encode("a " * 200_000).shape == (200_000,)
    assert tokenizer.decode(np.asarray([5, 6], np.int32)) == "a b"
    assert tokenizer.decode([]) == ""
    assert tokenizer.vocab_size == len(WORDS)


def test_special_ids(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    # We do not pad when encoding, but the token with which the file pads is ours too.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad) == (1, 2, 0)
    assert tokenizer.encode("a <|eot_id|> b").tolist() == [5, 3, 6]
    assert tokenizer.decode([5, 3, 6], skip_special_tokens=True) == "a b"


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, 0),
        ({"eos_token": "</s>"}, 2),
        ({"eos_token": "</s>", "pad_token": "<extra>"}, 4),
        ({"pad_token": "<unk>"}, 0),
    ],
)
def test_pad(special: dict[str, str], expected: int) -> None:
    assert wrap(backend(), special_tokens=special).pad == expected


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, (2, 3)), (2, (2, 3)), (4, (2, 3, 4)), ([2, 4, 4, 7], (2, 3, 4, 7)), ("</s>", (2, 3))]
)
def test_stop_tokens(directory: Path, eos: Any, expected: tuple[int, ...]) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.stop_tokens == expected
    tokenizer.save(directory / "again")
    assert Tokenizer.load(directory / "again").stop_tokens == expected


def test_without_any_end_there_is_no_stop() -> None:
    plain = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    assert wrap(plain, special_tokens={}).stop_tokens == ()


def test_saving_keeps_a_generation_config_that_is_there(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    Tokenizer.load(directory).save(directory)
    assert json.loads((directory / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_saved_class_is_known_to_old_and_new_transformers(directory: Path) -> None:
    Tokenizer.load(directory).save(directory / "again")
    config = json.loads((directory / "again" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "NoSuchTokenizer"])
def test_tokenizer_json_is_taken_as_it_is(directory: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    assert Tokenizer.load(directory).encode("a b <s> zz").tolist() == [5, 6, 1, 0]
    assert capfd.readouterr() == ("", "")


def test_code_in_the_directory_is_never_run(directory: Path) -> None:
    marker = directory / "ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    path = directory / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text("{}")
    with refused("cannot be loaded"):
        Tokenizer.load(directory)
    assert not marker.exists()


def test_without_files(tmp_path: Path) -> None:
    with refused(str(tmp_path), "has no tokenizer", "tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
    ],
)
def test_damaged_files(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    with refused(str(directory), "again"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with quiet_transformers():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == before


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 160


def test_a_tokenizer_is_called_as_hugging_faces_are(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer("a b").tolist() == tokenizer.encode("a b", special_tokens=True).tolist()
    assert [ids.tolist() for ids in tokenizer(["a b", "c"])] == [[5, 6], [7]]
    for wrong in (None, 3, b"a", ["a", 3]):
        with refused("expected a text"):
            tokenizer(wrong)
    with refused("list", "expected a text", "call the tokenizer"):
        tokenizer.encode(["a"])
    assert tokenizer.encode("\udcff").tolist() == tokenizer.encode("?").tolist()


def test_what_can_be_decoded(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    for ids in ([5, 6], np.array([[5, 6]]), np.array([5, 6], np.uint8), jnp.asarray([5, 6])):
        assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([5, 1000, 6]) == "a b"  # of a row that pads an embedding
    for wrong in ([-1], [2**31], [2**40], [2**70], [0.5], [True], [None], [[1], [2]], [[1], [2, 3]], 5, "ab", None):
        with refused("to decode"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize(
    ("config", "stops"),
    [
        ({"eos_token_id": 4}, (2, 3, 4)),
        ({"eos_token_id": [4, 6]}, (2, 3, 4, 6)),
        ({"text_config": {"eos_token_id": [4, 2]}}, (2, 3, 4)),
        ({"eos_token_id": None}, (2, 3)),
        ({}, (2, 3)),
    ],
)
def test_ends_of_a_text_that_config_json_names(directory: Path, config: dict[str, Any], stops: tuple[int, ...]) -> None:
    (directory / "config.json").write_text("\ufeff" + json.dumps(config))
    assert Tokenizer.load(directory).stop_tokens == stops


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model by its own trainer; it puts a space before a text, as Llama's and Mistral's do."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "text.txt").write_text("The quick brown fox jumps over lazy dogs, 12345 times.\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"),
        model_prefix=str(directory / "m"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=3,
    )
    return (directory / "m.model").read_bytes()


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ({}, {"tokenizer_class": "GemmaTokenizer"}),
        ({"model_type": "mistral"}, None),
        ({}, None),
    ],
)
def test_a_sentencepiece_model_alone_cuts_text_as_sentencepiece_does(
    spaced: bytes, tmp_path: Path, config: dict[str, Any], settings: dict[str, Any] | None
) -> None:
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "tokenizer.model").write_bytes(spaced)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, text = Tokenizer.load(tmp_path), "The fox jumps 5 times ☃."
    expected = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert tokenizer.encode(text).tolist() == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.prefix() == ((1,) if settings and "add_bos_token" in settings else ())
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(text).tolist() == expected


@pytest.mark.parametrize("content", [b"", b"x", bytes(1000), b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with refused("tokenizer.model: is not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_tiktokens_format_needs_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tiktoken" else find(name, *a))
    with refused("needs the package tiktoken"):
        Tokenizer.load(tmp_path)


def test_the_package_that_a_sentencepiece_model_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sentencepiece" else find(name, *a)
    )
    with refused("needs the package sentencepiece", "pip install sentencepiece"):
        Tokenizer.load(tmp_path)


WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
NOBODYS_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<nobody>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": WORD_LEVEL, "added_tokens": []},  # an Exception of the library's
        {"model": WORD_LEVEL | {"vocab": {"b": 4_000_000_000, "<unk>": 1}}},  # an id that int32 does not hold
        {"post_processor": NOBODYS_TEMPLATE},  # a panic in Rust, which is no Exception
    ],
)
def test_a_tokenizer_that_fails_at_a_text_is_refused(directory: Path, changes: dict[str, Any]) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    tokenizer = Tokenizer.load(directory)
    with refused("cannot encode this text", "again"):
        tokenizer.encode("b", special_tokens=True)


def test_a_decoder_that_fails_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    strip = {"type": "Strip", "content": "a", "start": 9, "stop": 9}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": strip}))
    with refused("cannot decode these ids", "again"):
        Tokenizer.load(directory).decode([5])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('one\\ntwo') }}",
        "{{ messages.append(1) }}",
        "{% if",
        5,
        [{"name": "other", "template": ""}],
    ],
)
def test_chat_templates_run_in_a_sandbox(directory: Path, template: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    with refused("the chat template refuses these messages"):
        Tokenizer.load(directory).apply_chat_template([{"role": "user", "content": "a"}])
