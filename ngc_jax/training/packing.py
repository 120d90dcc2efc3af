"""Rows of one length from tokenised documents; NumPy only, and deterministic.

Grain has its own packing, but as transformations of a stream. Here the same functions serve sources that are read
whole, where any row must be accessible by its number, and a stream's windows; and they count what they leave out.

A row is a dict of arrays (L,), a batch one of arrays (B, L):

- `tokens`, int32;
- `positions`, int32: the index in the row, 0 to L - 1; -1 for padding;
- `starts`, int32: the index at which the token's document begins in this row;
- `weights`, float32: 1 where this token is to be predicted and counts in the loss, else 0. The first token of a
  document in a row is never predicted, nor are a prompt's tokens or padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ngc_jax.errors import UsageError

Row = dict[str, np.ndarray]
LongDocuments = Literal["cut", "drop"]

OPEN_ROWS = 256


@dataclass(frozen=True)
class TokenDocument:
    """A document as tokens.

    Attributes:
        tokens: (T,) token ids.
        prompt: Number of its first tokens that are a prompt, which is read but not predicted.
    """

    tokens: np.ndarray
    prompt: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other.

    Attributes:
        tokens: (T,) int32.
        predicted: (T,) bool: false for a prompt's tokens.
        offsets: (D + 1,) int64: document d is tokens[offsets[d] : offsets[d + 1]].
    """

    tokens: np.ndarray
    predicted: np.ndarray
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Layout:
    """The pieces of a corpus that each row consists of.

    Attributes:
        offsets: (R + 1,) int64: row r has the pieces offsets[r] to offsets[r + 1] - 1, side by side.
        begins: (pieces,) int64: where a piece begins in the corpus.
        lengths: (pieces,) int64: its tokens, all of one document.
        dropped_documents: Documents with no token in a row.
        dropped_tokens: Tokens in no row, including those of cut documents.
    """

    offsets: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    dropped_documents: int = 0
    dropped_tokens: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1


def join(documents: Iterable[TokenDocument]) -> Corpus:
    """Concatenate documents; those without tokens are left out."""
    kept = [document for document in documents if len(document.tokens)]
    if not kept:
        return Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64))
    lengths = np.array([len(document.tokens) for document in kept], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.array([document.prompt for document in kept], np.int64)
    tokens = np.concatenate([document.tokens for document in kept]).astype(np.int32, copy=False)
    predicted = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths) >= np.repeat(prompts, lengths)
    return Corpus(tokens, predicted, offsets)


def clip(corpus: Corpus, skip: int, most: int | None) -> Corpus:
    """Keep at most `most` tokens of a corpus after the first `skip`; documents at the ends are cut."""
    end = len(corpus.tokens) if most is None else min(skip + most, len(corpus.tokens))
    skip = min(skip, end)
    inner = corpus.offsets[(corpus.offsets > skip) & (corpus.offsets < end)]
    offsets = np.concatenate([[skip], inner, [end]]) if end > skip else np.array([skip])
    return Corpus(corpus.tokens[skip:end], corpus.predicted[skip:end], offsets.astype(np.int64) - skip)


def begin_pieces(corpus: Corpus, prefix: Sequence[int], length: int | None) -> Corpus:
    """Insert a model's prefix, such as BOS, wherever a row begins to read a document.

    Args:
        corpus: The documents.
        prefix: The tokens; may be empty. A document that already begins with them is not changed.
        length: Tokens of a row if documents are to be concatenated: a document that a row cuts gets the prefix again in
            the next row.

    Returns:
        The corpus, longer by the prefixes, which are read but not predicted.

    Raises:
        UsageError: If a row has no room for the prefix and two more tokens.
    """
    if not prefix or not len(corpus.tokens):
        return corpus
    if length is not None and length < len(prefix) + 2:
        raise UsageError(f"rows of {length} tokens have no room for {len(prefix)} before a text; give longer rows")
    first = np.asarray(prefix, np.int32)
    tokens: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    offsets, total = [0], 0
    for begin, end in itertools.pairwise(corpus.offsets.tolist()):
        if np.array_equal(corpus.tokens[begin : begin + len(first)], first):
            begin += len(first)
        while begin < end:
            room = end - begin if length is None else length - total % length - len(first)
            if room < 2 and length is not None:  # too little room: filled with the start of the next
                fill = length - total % length
                tokens.append(np.resize(first, fill))
                predicted.append(np.zeros(fill, bool))
                total += fill
                continue
            piece = slice(begin, min(begin + room, end))
            tokens += [first, corpus.tokens[piece]]
            predicted += [np.zeros(len(first), bool), corpus.predicted[piece]]
            total += len(first) + piece.stop - begin
            begin = piece.stop
        offsets.append(total)
    return Corpus(np.concatenate(tokens), np.concatenate(predicted), np.asarray(offsets, np.int64))


def concatenate(corpus: Corpus, length: int) -> Layout:
    """Cut a corpus into rows, all but the last of them full; a document may continue in the next row.

    Args:
        corpus: The documents.
        length: L, tokens of a row.

    Returns:
        The layout; nothing is dropped.

    Raises:
        UsageError: If the length is below 2.
    """
    _check_length(length)
    total = len(corpus.tokens)
    cuts = np.arange(0, total, length, dtype=np.int64)
    begins = np.union1d(corpus.offsets[:-1], cuts)
    lengths = np.diff(np.append(begins, total))
    return Layout(np.searchsorted(begins, np.append(cuts, total)), begins, lengths)


def pack(corpus: Corpus, length: int, *, long: LongDocuments = "cut", open_rows: int = OPEN_ROWS) -> Layout:
    """Put whole documents into rows: each into the first row with room for it ("first fit").

    Only the newest rows are considered: if none has room and `open_rows` are open, the fullest is closed.

    Args:
        corpus: The documents.
        length: L, tokens of a row.
        long: Documents of more than L tokens are cut or dropped. In both cases a document with nothing to predict is
            dropped too.
        open_rows: Number of rows that may still get documents.

    Returns:
        The layout; rows in the order in which they were begun.

    Raises:
        UsageError: If the length is below 2, or `long` is unknown.
    """
    _check_length(length)
    if long not in ("cut", "drop"):
        raise UsageError(f"long is {long!r}; expected cut or drop")
    whole = np.diff(corpus.offsets)
    sizes = np.minimum(whole, length)
    counted = np.append(0, np.cumsum(corpus.predicted))
    begins = corpus.offsets[:-1]
    kept = counted[begins + sizes] > counted[begins + np.minimum(sizes, 1)]
    if long == "drop":
        kept &= whole <= length
    chosen = np.flatnonzero(kept)
    row_of = _first_fit(sizes[chosen], length, open_rows)
    order = np.argsort(row_of, kind="stable")
    rows = int(row_of.max()) + 1 if len(row_of) else 0
    return Layout(
        np.searchsorted(row_of[order], np.arange(rows + 1)),
        begins[chosen][order],
        sizes[chosen][order],
        dropped_documents=int(len(whole) - len(chosen)),
        dropped_tokens=int(whole.sum() - sizes[chosen].sum()),
    )


def make_row(corpus: Corpus, layout: Layout, row: int, length: int, pad: int = 0) -> Row:
    """One row of a layout.

    Args:
        corpus: The documents.
        layout: From the same corpus and length.
        row: Its index, 0 to `layout.rows` - 1.
        length: L.
        pad: The padding token.

    Returns:
        Arrays (L,); see the head of this module.
    """
    out, column = blank_row(length, pad), 0
    for piece in range(layout.offsets[row], layout.offsets[row + 1]):
        begin, size = layout.begins[piece], layout.lengths[piece]
        here = slice(column, column + size)
        out["tokens"][here] = corpus.tokens[begin : begin + size]
        out["starts"][here] = column
        out["weights"][here] = corpus.predicted[begin : begin + size]
        out["weights"][column] = 0
        column += size
    out["positions"][:column] = np.arange(column)
    out["starts"][column:] = column
    return out


def blank_row(length: int, pad: int = 0) -> Row:
    """A row without any document: arrays (L,), all positions -1 and all weights 0."""
    return {
        "tokens": np.full(length, pad, np.int32),
        "positions": np.full(length, -1, np.int32),
        "starts": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
    }


def _check_length(length: int) -> None:
    if length < 2:
        raise UsageError(f"rows of {length} tokens; expected at least 2, one to read and one to predict")


def _first_fit(sizes: np.ndarray, length: int, open_rows: int) -> np.ndarray:
    """The row of each document, (documents,) int64; sizes are 1 to `length`."""
    row_of = np.zeros(len(sizes), np.int64)
    free = np.zeros(open_rows, np.int64)  # of the open rows, oldest first
    number = np.zeros(open_rows, np.int64)
    opened = used = 0
    for document, size in enumerate(sizes.tolist()):
        fits = free[:used] >= size
        place = int(fits.argmax()) if used else 0
        if not (used and fits[place]):
            if used == open_rows:
                fullest = int(free.argmin())
                free[fullest:-1], number[fullest:-1] = free[fullest + 1 :].copy(), number[fullest + 1 :].copy()
                used -= 1
            place, free[used], number[used] = used, length, opened
            used, opened = used + 1, opened + 1
        free[place] -= size
        row_of[document] = number[place]
    return row_of
