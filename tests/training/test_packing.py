from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.training.packing import TokenDocument, blank_row, clip, concatenate, join, make_row, pack

PAD = 7


@st.composite
def corpora(draw):
    """Documents whose tokens are all different, as numbers from 1000 on."""
    sizes = draw(st.lists(st.integers(0, 13), min_size=0, max_size=12))
    first, documents = 1000, []
    for size in sizes:
        documents.append(TokenDocument(np.arange(first, first + size), draw(st.integers(0, size + 1))))
        first += size
    return documents


def rows_of(corpus, layout, length):
    return [make_row(corpus, layout, row, length, PAD) for row in range(layout.rows)]


def check_rows(rows, documents, length):
    """Recompute everything but the tokens from the tokens alone, token by token."""
    home = {int(token): d for d, document in enumerate(documents) for token in document.tokens}
    prompts = {int(token) for document in documents for token in document.tokens[: document.prompt]}
    for row in rows:
        assert {name: (a.shape, a.dtype.name) for name, a in row.items()} == {
            "tokens": ((length,), "int32"),
            "positions": ((length,), "int32"),
            "starts": ((length,), "int32"),
            "weights": ((length,), "float32"),
        }
        first_of, padded = {}, False
        for index, token in enumerate(row["tokens"].tolist()):
            if token == PAD:
                padded = True
                assert (row["positions"][index], row["weights"][index]) == (-1, 0)
                continue
            assert not padded  # only the end of a row is filled up
            start = first_of.setdefault(home[token], index)
            assert row["positions"][index] == index
            assert row["starts"][index] == start
            assert row["weights"][index] == (index != start and token not in prompts)
        starts = row["starts"][row["positions"] >= 0]
        assert (np.diff(starts) >= 0).all()  # a document's tokens stand together
        assert not set(starts) & set(row["starts"][row["positions"] < 0])


def kept_tokens(rows):
    return [token for row in rows for token in row["tokens"].tolist() if token != PAD]


@given(corpora(), st.integers(2, 9))
def test_concatenated_rows_read_one_after_the_other_are_the_documents(documents, length):
    corpus = join(documents)
    layout = concatenate(corpus, length)
    rows = rows_of(corpus, layout, length)
    check_rows(rows, documents, length)
    assert kept_tokens(rows) == [token for document in documents for token in document.tokens.tolist()]
    assert all((row["positions"] >= 0).all() for row in rows[:-1])
    assert (layout.dropped_documents, layout.dropped_tokens) == (0, 0)


@given(corpora(), st.integers(2, 9), st.sampled_from(["cut", "drop"]), st.integers(1, 4))
def test_packed_rows_hold_every_document_once_or_it_is_counted(documents, length, long, open_rows):
    corpus = join(documents)
    layout = pack(corpus, length, long=long, open_rows=open_rows)
    rows = rows_of(corpus, layout, length)
    check_rows(rows, documents, length)
    expected, dropped = [], 0
    for document in documents:
        tokens = document.tokens.tolist()
        left = tokens[:length] if long == "cut" or len(tokens) <= length else []
        if any(index >= max(document.prompt, 1) for index in range(len(left))):
            expected += left
        elif tokens:
            dropped += 1
    assert Counter(kept_tokens(rows)) == Counter(expected)
    assert layout.dropped_documents == dropped
    assert layout.dropped_tokens == len(corpus.tokens) - len(expected)
    for row in rows:  # each document that is there is there whole, in its own order
        tokens = [token for token in row["tokens"].tolist() if token != PAD]
        starts = row["starts"][: len(tokens)]
        for start in set(starts.tolist()):
            piece = [token for token, s in zip(tokens, starts, strict=True) if s == start]
            assert piece == [token for token in expected if token in piece]


def naive_first_fit(sizes, length):
    rows = []
    for size in sizes:
        row = next((row for row in rows if sum(row) + size <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(size)
    return rows


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40))
def test_with_enough_open_rows_packing_is_first_fit(sizes):
    corpus = join([TokenDocument(np.arange(size)) for size in sizes])
    layout = pack(corpus, 9, open_rows=50)
    found = [layout.lengths[a:b].tolist() for a, b in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]
    assert found == naive_first_fit(sizes, 9)


def test_few_open_rows_close_the_fullest_and_the_order_is_that_of_beginning():
    corpus = join([TokenDocument(np.arange(size)) for size in (5, 8, 6, 4, 3)])
    layout = pack(corpus, 10, open_rows=2)
    # 6 fits neither 5 nor 8 and closes 8, so that 4 still finds room beside 5, and 3 beside 6.
    assert [part.tolist() for part in np.split(layout.lengths, layout.offsets[1:-1])] == [[5, 4], [8], [6, 3]]


@given(corpora(), st.integers(0, 70), st.one_of(st.none(), st.integers(1, 70)))
def test_clipping_keeps_tokens_prompts_and_documents_apart(documents, skip, most):
    whole = join(documents)
    clipped = clip(whole, skip, most)
    end = None if most is None else skip + most
    np.testing.assert_array_equal(clipped.tokens, whole.tokens[skip:end])
    np.testing.assert_array_equal(clipped.predicted, whole.predicted[skip:end])
    home = np.repeat(np.arange(whole.documents), np.diff(whole.offsets))[skip:end]
    again = np.repeat(np.arange(clipped.documents), np.diff(clipped.offsets))
    np.testing.assert_array_equal(np.unique(home, return_inverse=True)[1], again)


def test_an_example_in_full():
    documents = [TokenDocument(np.array([10, 11, 12]), 2), TokenDocument(np.array([20, 21, 22, 23, 24]))]
    corpus = join(documents)
    layout = concatenate(corpus, 6)
    first, last = rows_of(corpus, layout, 6)
    assert first["tokens"].tolist() == [10, 11, 12, 20, 21, 22]
    assert first["starts"].tolist() == [0, 0, 0, 3, 3, 3]
    assert first["weights"].tolist() == [0, 0, 1, 0, 1, 1]
    assert last["tokens"].tolist() == [23, 24, PAD, PAD, PAD, PAD]
    assert last["positions"].tolist() == [0, 1, -1, -1, -1, -1]
    assert last["weights"].tolist() == [0, 1, 0, 0, 0, 0]
    assert blank_row(6)["positions"].tolist() == [-1] * 6


def test_bad_lengths_and_choices_are_refused():
    corpus = join([TokenDocument(np.arange(3))])
    with pytest.raises(UsageError, match="rows of 1 tokens"):
        concatenate(corpus, 1)
    with pytest.raises(UsageError, match="rows of 0 tokens"):
        pack(corpus, 0)
    with pytest.raises(UsageError, match="'split'; expected cut or drop"):
        pack(corpus, 4, long="split")
