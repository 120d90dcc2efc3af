"""Text from a stream of tokens: whole characters, and spaces where they were."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from ngc_jax.models.generate import (
    text_pieces,
)
from ngc_jax.models.tokenizer import Tokenizer, wrap
from tests.tiny import tiny_tokenizer


def chunked(ids: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
    """Cut into pieces of these sizes over and over."""
    remaining, pieces = list(ids), []
    for size in itertools.cycle(sizes):
        if not remaining:
            return pieces
        pieces.append(np.array(remaining[:size], int))
        remaining = remaining[size:]
    return pieces


BYTE_TOKENIZER = tiny_tokenizer()


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.lists(st.integers(1, 5), min_size=1), st.integers(0, 10))
def test_characters_come_whole(text: str, sizes: list[int], cut: int) -> None:
    """One token per byte: pieces are the text, and none shows half a character."""
    ids = BYTE_TOKENIZER.encode(text)
    context, rest = BYTE_TOKENIZER.encode(text[:cut]), BYTE_TOKENIZER.encode(text[cut:])
    assert len(context) + len(rest) == len(ids)
    pieces = list(text_pieces(BYTE_TOKENIZER, chunked(rest, sizes), context))
    assert "".join(pieces) == text[cut:]
    assert "" not in pieces
    assert sum(piece.count("\ufffd") for piece in pieces) == text[cut:].count("\ufffd")


def test_a_character_that_is_never_finished_is_shown_at_the_end() -> None:
    ids = BYTE_TOKENIZER.encode("a€b€")
    assert list(text_pieces(BYTE_TOKENIZER, chunked(ids[:-1], [1]))) == ["a", "€", "b", "\ufffd"]
    broken = np.delete(ids, 3)
    assert "".join(text_pieces(BYTE_TOKENIZER, chunked(broken, [1]))) == "a\ufffdb€"


def spaces_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with a mark for a space, bytes stand for what is unknown, a first space is dropped."""
    tokens = ["<unk>", "<s>", "▁one", "▁two", "▁three", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend, special_tokens={"bos_token": "<s>", "unk_token": "<unk>"})


@pytest.mark.parametrize("size", [1, 2, 5])
def test_spaces_between_words_stay(size: int) -> None:
    tokenizer = spaces_tokenizer()
    euro = [6 + byte for byte in "€".encode()]
    ids = [3, 5, *euro, *euro, 1, 4, 2, *euro]
    assert tokenizer.decode([2, *ids], skip_special_tokens=True) == "one twos€€ three one€"
    pieces = list(text_pieces(tokenizer, chunked(ids, [size]), np.array([1, 2])))
    assert "".join(pieces) == " twos€€ three one€"
    assert "".join(text_pieces(tokenizer, chunked(ids, [size]))) == "twos€€ three one€"
