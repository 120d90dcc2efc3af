"""Calibration on several texts: shares of windows, rows and conversations, and what is refused."""

import json

import datasets
import numpy as np
import pytest

from ngc_jax.conversion.mixtures import described, mix_tokens, sources_of, text_label
from ngc_jax.errors import UsageError
from ngc_jax.tokens import begin_windows
from tests.tiny import tiny_tokenizer

# One token for each byte: the source of a token can be read from it.
TEXTS = {"a.txt": "a" * 4000, "b.txt": "b" * 4000, "c.txt": "c" * 4000}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mix(*texts, count=None, **options):
    return mix_tokens(sources_of(texts), tiny_tokenizer(), count, **options)


def letters(tokens):
    return tiny_tokenizer().decode(tokens)


def test_every_prefix_of_whole_windows_has_the_shares(place):
    window = 10
    mixed = mix("a.txt:0.5", "b.txt:0.3", "c.txt:0.2", count=1000, window=window)
    text = letters(mixed.tokens)
    assert len(text) == 1000
    assert mixed.counts == (500, 300, 200)
    for windows in range(1, 101):
        for letter, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(text[: windows * window].count(letter) / window - share * windows) <= 1
    assert all(len(set(text[start : start + window])) == 1 for start in range(0, 1000, window))


def test_the_texts_are_read_in_order_and_after_what_is_skipped(place):
    (place / "n.txt").write_text("".join(f"{number:04d}" for number in range(1000)))
    mixed = mix("a.txt:0.5", "n.txt:0.5", count=80, window=8, skip=12)
    text = letters(mixed.tokens)
    assert text.replace("a", "") == "".join(f"{number:04d}" for number in range(3, 13))


def test_windows_with_a_prefix_are_of_one_text(place):
    prefix = (ord("x") - ord("!"),)
    assert letters(prefix) == "x"
    (place / "b.txt").write_text("x" + "b" * 14 + "x" + "b" * 4000)  # where it has the prefix itself, as chats do
    mixed = mix("a.txt:0.5", "b.txt:0.5", count=140, window=8, prefix=prefix)
    windows = begin_windows(mixed.tokens, 8, prefix).reshape(-1, 8)
    assert len(windows) == 20
    assert [letters(window) for window in windows] == ["xaaaaaaa", "xbbbbbbb"] * 10


def test_the_last_window_may_be_short_and_a_short_text_ends_the_mixture(place):
    assert len(mix("a.txt:0.5", "b.txt:0.5", count=101, window=10).tokens) == 101
    (place / "b.txt").write_text("b" * 57)
    mixed = mix("a.txt:0.5", "b.txt:0.5", usual=1000, window=10)
    assert mixed.counts == (60, 50)  # b has no sixth whole window
    with pytest.raises(
        UsageError, match=r"b.txt is too short for a share of 0.5: it has 57 tokens, and 500 are needed"
    ):
        mix("a.txt:0.5", "b.txt:0.5", count=1000, window=10)


CHAT = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ({"text": "one"}, "text", "one\n"),
        ({"messages": CHAT, "text": "one"}, "messages", "<user>two<user>three"),
        ({"prompt": "two", "response": "three", "id": 1}, "prompt and response", "<user>two<user>three"),
    ],
)
def test_rows_are_read_by_their_fields(place, row, kind, text):
    (place / "rows.jsonl").write_text((json.dumps(row) + "\n\n") * 50)
    mixed = mix("a.txt:0.5", "rows.jsonl:0.5", count=200, window=10)
    taken = tiny_tokenizer().encode(text * 50)[:100]
    own = mixed.tokens.reshape(-1, 10)[1::2].ravel()
    np.testing.assert_array_equal(own, taken)
    assert mixed.rows == (None, kind)
    assert f"100 of rows.jsonl (rows by {kind})" in mixed.describe()
    assert described(["a.txt:0.5", "rows.jsonl:0.5"]) == [
        {"text": "a.txt", "share": 0.5, "rows": None},
        {"text": "rows.jsonl", "share": 0.5, "rows": kind},
    ]


def test_rows_of_the_hub(place, monkeypatch):
    rows = datasets.Dataset.from_dict({"messages": [CHAT] * 20})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    mixed = mix("a.txt:0.5", "hub:org/chats:main:0.5", count=40, window=10)
    assert mixed.rows == (None, "messages")
    assert mixed.sources[1].name == "hub:org/chats:main"


def test_a_single_text_without_a_share_is_no_mixture(place):
    (place / "odd:0.5").write_text("a file whose name has a colon and a number")
    for text in ("a.txt", ["a.txt"], "odd:0.5", "pydoc:first-half", "hub:org/name:1.0", "sampled", "rows.jsonl"):
        assert sources_of(text) == ()
    assert text_label("texts/a.txt") == text_label(["texts/a.txt"]) == "a.txt"
    (one,) = sources_of("rows.jsonl:1")
    assert (one.name, one.share) == ("rows.jsonl", 1.0)
    (first, _) = sources_of(["note:s.txt:0.5", "odd:0.5:0.5"])
    assert first.name == "note:s.txt"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a.txt:0.5", "b.txt:0.4"], r"add up to 0.9; expected 1"),
        (["a.txt:0.5"], r"add up to 0.5"),
        (["a.txt", "b.txt:0.5"], "a.txt has no share; .*a.txt:0.5"),
        (["note:s.txt", "b.txt:0.5"], r"note:s.txt has no share; .*note:s.txt:0.5 \(a colon"),
        (["a.txt:0", "b.txt:1"], "share of a.txt is 0; expected a number above 0"),
        (["hub:org/name:2024", "b.txt:0.5"], "share of hub:org/name is 2024"),
        (["a.txt:0.5", "a.txt:0.5"], "given twice"),
        (["sampled:0.5", "b.txt:0.5"], "cannot be mixed"),
        (["odd:0.5", "b.txt:0.5"], "odd:0.5 is a file, or odd with the share 0.5"),
        ([], "expected a text, or a list"),
    ],
)
def test_wrong_shares_are_refused(place, texts, message):
    (place / "odd:0.5").write_text("a file")
    with pytest.raises(UsageError, match=message):
        sources_of(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the text rows.jsonl cannot be read: No such file"),
        (b"", "rows.jsonl has no rows"),
        (b"{]\n", "line 1 of rows.jsonl is not JSON"),
        (b"[1]\n", "line 1 of rows.jsonl is list; expected an object with messages"),
        (b'{"question": "a"}\n', "line 1 of rows.jsonl has question; expected an object with messages"),
        (b'{"text": "a"}\n{"prompt": "a"}\n', "line 2 of rows.jsonl has no text, and the first row has"),
        (b'{"text": 3}\n', "text in line 1 of rows.jsonl is int"),
        (b'{"messages": []}\n', "line 1 of rows.jsonl cannot be read as a conversation"),
        (b'{"messages": "hello"}\n', "line 1 of rows.jsonl cannot be read as a conversation"),
        (b'{"text": "\xff"}\n', "rows.jsonl is not UTF-8"),
    ],
)
def test_wrong_rows_are_refused(place, content, message):
    if content is not None:
        (place / "rows.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        mix("a.txt:0.5", "rows.jsonl:0.5", count=100, window=10)
    assert "\n" not in str(error.value)


def test_a_mixture_needs_a_window_for_each_text(place):
    with pytest.raises(UsageError, match="100 tokens fill too few windows of 100 for b"):
        mix("a.txt:0.5", "b.txt:0.5", count=100, window=100)
    with pytest.raises(UsageError, match="no room for 1 tokens"):
        mix("a.txt:0.5", "b.txt:0.5", count=100, window=2, prefix=(3,))
