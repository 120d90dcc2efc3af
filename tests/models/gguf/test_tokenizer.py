"""Tokenizers rebuilt from GGUF metadata, against transformers' own definitions and a literal SentencePiece."""

import inspect
import itertools
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf.pretokenizers import PRE_TOKENIZERS
from ngc_jax.models.gguf.tokenizer import tokenizer_from_gguf
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.models.tokenizer_model import quiet_transformers

with quiet_transformers():
    from transformers import AutoTokenizer, GemmaTokenizer
    from transformers.convert_slow_tokenizer import GPT2Converter, Qwen2Converter, TikTokenConverter

LINES = [
    "The 3 quick brown foxes jumped over 12345 lazy dogs; they've said “it's 1998!”",
    "I'LL don't stop, you're right.\r\n\n\n    for i in range(10):\n\t\tprint(f'{i:03d} => {i**2}')",
    "HelloWorld, naïve café Ångström ½ x² 你好世界 안녕 🙂.",
]
CORPUS = "\n   ".join(LINES * 3)
TEXTS = st.one_of(
    st.text(st.sampled_from("ab tsZÉé\u0301 '1239½\n\r\t.,!/_=$你가🙂"), max_size=40),
    st.text(max_size=20),
    st.lists(st.sampled_from(CORPUS.split(" ")), max_size=8).map(" ".join),
)
SPECIAL = {"<|end|>": 3, "<|user|>": 3, "<tool>": 4}


# --- byte-level BPE ---------------------------------------------------------------------------------------------


def reference_pipeline(pre: str) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]:
    """What transformers itself, or the model's published tokenizer, puts before the merges."""
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre == "llama-bpe":
        pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return None, pre_tokenizers.Sequence([split, to_bytes])
    converter = {"gpt-2": GPT2Converter, "qwen2": Qwen2Converter}[pre]
    slow = SimpleNamespace(encoder={"a": 0}, bpe_ranks={})
    backend = converter(slow).converted()
    return backend.normalizer, backend.pre_tokenizer


def trained(pre: str) -> Backend:
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    normalizer, backend.pre_tokenizer = reference_pipeline(pre)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([CORPUS], trainer)
    backend.add_tokens([AddedToken(token, special=kind == 3, normalized=False) for token, kind in SPECIAL.items()])
    return backend


def to_metadata(backend: Backend, pre: str, /, **changes: Any) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *SPECIAL],
        "token_type": [1] * len(tokens) + list(SPECIAL.values()),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": len(tokens),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


@cache
def family(pre: str) -> tuple[Backend, Tokenizer]:
    backend = trained(pre)
    return backend, tokenizer_from_gguf(to_metadata(backend, pre), "m.gguf")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
@given(text=TEXTS)
@example(CORPUS)
@example(" 12345½  x²\u0301 e\u0301")
def test_byte_level_ids_are_those_of_the_published_tokenizer(pre: str, text: str) -> None:
    reference, ours = family(pre)
    assert ours.encode(text).tolist() == reference.encode(text).ids
    if pre != "qwen2":  # which brings text to normal form C
        assert ours.decode(ours.encode(text)) == text


def pieces(pre: str, text: str) -> list[str]:
    _, pre_tokenizer = PRE_TOKENIZERS[pre].build()
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "In 12345", ["In", " ", "1", "2", "3", "4", "5"]),
        ("gpt-2", "In 12345", ["In", " 12345"]),
        ("llama-bpe", "In 12345's", ["In", " ", "123", "45", "'s"]),
        ("qwen2", "In 123's", ["In", " ", "1", "2", "3", "'s"]),
        ("default", "(a) 12345", ["(", "a", ")", " ", "123", "45"]),
        (
            "tekken",
            "camelCase HTTPServer 42 a/b\n",
            ["camel", "Case", " HTTPServer", *" 42", " a", "/b", "\n"],
        ),
        ("deepseek-coder", "a = b12,\nc", ["a", " =", " b", "1", "2", ",", "\n", "c"]),
        ("seed-coder", "x1;\n\ny", ["x", "1", ";", "\n\n", "y"]),
        ("qwen2", "x1;\n\ny", ["x", "1", ";\n\n", "y"]),
    ],
)
def test_how_text_is_cut(pre: str, text: str, words: list[str]) -> None:
    assert pieces(pre, text) == words


@given(text=TEXTS)
def test_every_pre_tokenizer_keeps_all_text(text: str) -> None:
    for pre in PRE_TOKENIZERS:
        assert "".join(pieces(pre, text)) == text


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False)])
def test_a_word_that_is_a_token_may_skip_the_merges(pre: str, whole: bool) -> None:
    tokens = ["a", "b", "c", "bc", "abc"]
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["b c"],
        },
        "m.gguf",
    )
    assert [tokens[index] for index in tokenizer.encode("abc")] == (["abc"] if whole else ["a", "bc"])


def test_special_tokens_are_found_in_text() -> None:
    _, tokenizer = family("smollm")
    end, user, tool = range(tokenizer.vocab_size - 3, tokenizer.vocab_size)
    ids = tokenizer.encode("<|user|>12<tool>x<|end|>").tolist()
    assert [index for index in ids if index >= end] == [user, tool, end]
    assert ids[0] == user
    assert tokenizer.decode(ids) == "<|user|>12<tool>x<|end|>"
    # Only control tokens are special; what the user defined is text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12<tool>x"
    assert tokenizer.stop_tokens == (end,)
    assert tokenizer.eos_token_id == end
    assert tokenizer.bos_token_id is None
    assert tokenizer.pad == end


def test_begin_and_end_follow_the_flags() -> None:
    backend, plain = family("smollm")
    end = plain.vocab_size - 3
    assert plain.encode("ab", special_tokens=True).tolist() == plain.encode("ab").tolist()
    both = to_metadata(backend, "smollm", bos_token_id=end + 1, add_bos_token=True, add_eos_token=True)
    tokenizer = tokenizer_from_gguf(both, "m.gguf")
    assert tokenizer.encode("ab").tolist() == plain.encode("ab").tolist()
    assert tokenizer.encode("ab", special_tokens=True).tolist() == [end + 1, *plain.encode("ab"), end]
    assert tokenizer.bos_token_id == end + 1
    # Llama 3 begins with BOS unless the file says no.
    for flag, expected in ((None, True), (True, True), (False, False)):
        keys = to_metadata(backend, "llama-bpe", bos_token_id=end + 1, add_bos_token=flag)
        ids = tokenizer_from_gguf(keys, "m.gguf").encode("ab", special_tokens=True)
        assert (ids[0] == end + 1) == expected


def test_ends_of_turns_stop_generation() -> None:
    backend, plain = family("smollm")
    end = plain.vocab_size - 3
    keys = to_metadata(backend, "smollm", eot_token_id=end + 1, eos_token_id=0)
    assert tokenizer_from_gguf(keys, "m.gguf").stop_tokens == (0, end, end + 1)


def test_chat_template() -> None:
    backend, plain = family("smollm")
    template = (
        "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    keys = to_metadata(backend, "smollm", bos_token_id=0, add_bos_token=True)
    tokenizer = tokenizer_from_gguf(keys | {"tokenizer.chat_template": template}, "m.gguf")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi 12"}])
    assert ids.tolist() == plain.encode("<|user|>user: hi 12<|end|>answer").tolist()
    assert not plain.has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        plain.apply_chat_template([{"role": "user", "content": "hi"}])
    picky = keys | {"tokenizer.chat_template": "{{ raise_exception('roles\nmust alternate') }}"}
    with pytest.raises(UsageError, match="roles must alternate"):
        tokenizer_from_gguf(picky, "m.gguf").apply_chat_template([{"role": "x", "content": "y"}])


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
def test_saved_tokenizer_is_the_same(pre: str, tmp_path: Path) -> None:
    backend, plain = family(pre)
    keys = to_metadata(backend, pre, bos_token_id=plain.vocab_size - 2, add_bos_token=True, eot_token_id=0)
    tokenizer = tokenizer_from_gguf(keys | {"tokenizer.chat_template": "x{{ messages[0]['content'] }}"}, "m.gguf")
    tokenizer.save(tmp_path / "saved")
    # A directory of a whole model has a config.json, from which AutoTokenizer draws conclusions.
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    ours = Tokenizer.load(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = CORPUS + " 12½ ² <|user|>"
    assert ours.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert ours.encode("a b", special_tokens=True).tolist() == tokenizer.encode("a b", special_tokens=True).tolist()
    assert theirs(text)["input_ids"] == tokenizer.encode(text, special_tokens=True).tolist()
    assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert ours.stop_tokens == tokenizer.stop_tokens == (plain.vocab_size - 3, 0)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages).tolist() == tokenizer.encode("xhi").tolist()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad,
    )


# --- SentencePiece ----------------------------------------------------------------------------------------------

PIECES = [
    *("<unk>", "<s>", "</s>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("<turn>", "\n\n"),
    *("▁t", "he", "▁the", "in", "▁a", "er", "th", "▁th", "ab", "bab", "aba", "▁▁", "abab", "▁in", "ing", "e▁"),
    *("▁", "a", "b", "c", "e", "g", "h", "i", "n", "r", "t", "é", "\n"),
]
TYPES = [2, 3, 3] + [6] * 256 + [3, 4] + [1] * 29
# Better the earlier, but for one pair of equals.
SCORES = [0.0] * 261 + [-float(rank) for rank in range(29)]
SPM_TEXTS = st.text(st.sampled_from("abcehginrt é\nZ🙂"), max_size=24)


def spm_metadata(**changes: Any) -> dict[str, Any]:
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": PIECES,
        "token_type": TYPES,
        "scores": SCORES,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


def sentencepiece(text: str, *, prefix: bool) -> list[int]:
    """SentencePiece's BPE by the book: user-defined pieces stand, then join the best-scored pair, leftmost first."""
    ids: list[int] = []
    for index, part in enumerate(text.split("\n\n")):
        if index:
            ids.append(PIECES.index("\n\n"))
        if not part:
            continue
        symbols = list(("▁" if prefix else "") + part.replace(" ", "▁"))
        while True:
            joined = [
                (-SCORES[PIECES.index(left + right)], at)
                for at, (left, right) in enumerate(itertools.pairwise(symbols))
                if left + right in PIECES
            ]
            if not joined:
                break
            _, at = min(joined)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            known = [PIECES.index(symbol)] if symbol in PIECES else [3 + byte for byte in symbol.encode()]
            ids.extend(known)
    return ids


@pytest.mark.parametrize("prefix", [True, False])
@given(text=SPM_TEXTS)
@example("the  bababab in\n\n\ning Zé🙂")
def test_sentencepiece_ids_are_those_of_the_algorithm(prefix: bool, text: str) -> None:
    tokenizer = spm(prefix)
    assert tokenizer.encode(text).tolist() == sentencepiece(text, prefix=prefix)


@cache
def spm(prefix: bool) -> Tokenizer:
    return tokenizer_from_gguf(spm_metadata(**({} if prefix else {"add_space_prefix": False})), "m.gguf")


@pytest.mark.parametrize("prefix", [True, False])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=20))
def test_sentencepiece_round_trip(prefix: bool, text: str) -> None:
    if prefix and "\n\n" in text:
        return  # every part gets a space in front, and only the first is taken away
    assert spm(prefix).decode(spm(prefix).encode(text)) == text


@given(text=SPM_TEXTS)
def test_gemma_pipeline_is_transformers(text: str) -> None:
    ours = spm(False)
    backend = ours._backend
    vocabulary = backend.get_vocab(with_added_tokens=False)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    theirs = GemmaTokenizer(vocab=vocabulary, merges=merges, mask_token="<unk>", **special)
    if "\n\n" in text:
        return  # not declared to their tokenizer
    assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_sentencepiece_special_tokens() -> None:
    tokenizer = spm(True)
    turn = PIECES.index("<turn>")
    assert tokenizer.encode("<turn>the<s>").tolist() == [turn, PIECES.index("▁the"), 1]
    assert tokenizer.encode("the", special_tokens=True).tolist() == [1, PIECES.index("▁the")]
    silent = tokenizer_from_gguf(spm_metadata(add_bos_token=False), "m.gguf")
    assert silent.encode("the", special_tokens=True).tolist() == [PIECES.index("▁the")]
    assert tokenizer.stop_tokens == (2,)
    # The published defaults of SentencePiece when the file names no ids.
    bare = tokenizer_from_gguf(spm_metadata(bos_token_id=None, eos_token_id=None), "m.gguf")
    assert (bare.bos_token_id, bare.eos_token_id) == (1, 2)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": None}, ["no tokenizer"]),
        ({"model": "bert"}, ["'bert'", "gpt2 or llama"]),
        ({"pre": "smolm"}, ["'smolm'", "did you mean smollm?"]),
        ({"pre": 7}, ["'7'"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"tokens": []}, ["tokenizer.ggml.tokens"]),
        ({"tokens": [1, 2]}, ["tokenizer.ggml.tokens"]),
        ({"token_type": [1]}, ["token_type"]),
        ({"token_type": "all"}, ["token_type"]),
        ({"merges": None}, ["merges"]),
        ({"merges": ["ab"]}, ["'ab' is not a pair"]),
        ({"merges": ["a nosuchtoken"]}, ["merges do not fit"]),
        ({"eos_token_id": 10**6}, ["eos", "1000000"]),
        ({"bos_token_id": -2}, ["bos", "-2"]),
        ({"bos_token_id": "<s>"}, ["bos", "'<s>'"]),
    ],
)
def test_damaged_byte_level_tokenizers(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tokenizer_from_gguf(to_metadata(family("smollm")[0], "smollm", **changes), "m.gguf")
    for part in ("m.gguf", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scores", [None, [0.0], ["a"] * len(PIECES), 3])
def test_damaged_sentencepiece_scores(scores: Any) -> None:
    with pytest.raises(UsageError, match="scores"):
        tokenizer_from_gguf(spm_metadata(scores=scores), "m.gguf")
