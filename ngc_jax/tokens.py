"""Streams of token ids: conversion of user input to a stream, and the prefix of each window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from ngc_jax.errors import UsageError

Bos = Literal["auto", "always", "never"]


class Encoder(Protocol):
    """Encodes a text to token ids, such as `models.tokenizer.Tokenizer`."""

    def encode(self, text: str) -> np.ndarray:
        """(L,) int32 ids."""


def as_tokens(tokens: Any, vocab_size: int, *, tokenizer: Encoder | None = None, least: int = 1) -> np.ndarray:
    """Convert any accepted form of input to one stream of token ids.

    Args:
        tokens: (T,) whole numbers, a NumPy or JAX array or a list; or (1, T); or, with a tokenizer, a text, or a list
            of texts that are read one after the other.
        vocab_size: Of the model; ids are below it.
        tokenizer: The model's.
        least: Minimum number of tokens.

    Returns:
        (T,) int32.

    Raises:
        UsageError: If it has another form, is too short, or has an id outside the model's vocabulary.

    Example:
        >>> as_tokens([[3, 1, 4]], 10)
        array([3, 1, 4], dtype=int32)
    """
    texts = [tokens] if isinstance(tokens, str) else tokens
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise UsageError("a text was given, and there is no tokenizer here to read it; expected token ids, (T,)")
        tokens = np.concatenate([tokenizer.encode(text) for text in texts])
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of different lengths
        raise UsageError("the tokens are rows of different lengths; expected one stream, (T,): join the rows") from None
    wanted = "token ids" if tokenizer is None else "token ids or a text"
    if array.dtype.kind in "OSU" or array.ndim == 0:
        raise UsageError(f"the tokens are {_kind(tokens)}; expected {wanted}, (T,) whole numbers")
    array = array[0] if array.ndim == 2 and len(array) == 1 else array
    if array.ndim != 1:
        raise UsageError(f"the tokens are of shape {array.shape}; expected one stream, (T,): join the rows")
    if len(array) < least:
        raise UsageError(f"there are {len(array)} tokens; expected at least {least}: give a longer text")
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"the tokens are of type {array.dtype}; expected {wanted}, (T,) whole numbers")
    check_ids(array, vocab_size)
    return array.astype(np.int32)


def as_rows(prompts: Any, encode: Callable[[str], np.ndarray]) -> list[np.ndarray]:
    """Convert any accepted form of prompts to one array of token ids for each.

    Args:
        prompts: Arrays or lists of whole numbers, (L,) or (1, L) each, and texts; or one of these alone; or (B, L).
        encode: Reads a text.

    Returns:
        The ids of each prompt; neither they nor their number are checked.

    Raises:
        UsageError: If it is none of these.

    Example:
        >>> [row.tolist() for row in as_rows([3, 1, 4], encode=None)]
        [[3, 1, 4]]
    """
    if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0 or isinstance(prompts, bytes | dict):
        raise UsageError(f"prompts is {type(prompts).__name__}; expected texts, or token ids (L,) of each")
    alone = isinstance(prompts, str) or getattr(prompts, "ndim", 0) == 1 or _is_ids(prompts)
    found = []
    for index, prompt in enumerate([prompts] if alone else prompts):
        if isinstance(prompt, dict):
            raise UsageError(
                f"prompt {index} is a message of a conversation; expected a text, or token ids (L,), which "
                "Tokenizer.apply_chat_template makes of a conversation"
            )
        if isinstance(prompt, str):
            prompt = encode(prompt)
        try:
            ids = np.asarray(prompt)
        except ValueError:
            raise UsageError(f"prompt {index} has rows of different lengths; expected token ids, (L,)") from None
        if ids.dtype.kind in "OSU":
            raise UsageError(f"prompt {index} is {_kind(prompt)}; expected a text, or token ids (L,)")
        found.append(ids[0] if ids.ndim == 2 and len(ids) == 1 else ids)
    return found


def _is_ids(prompts: object) -> bool:
    """Whether a list is one prompt's ids."""
    return isinstance(prompts, list | tuple) and bool(prompts) and all(isinstance(i, int | np.integer) for i in prompts)


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    first = next(iter(value), None) if isinstance(value, list | tuple) else None
    name = type(value).__name__
    return name if first is None else f"a {name} of {type(first).__name__}"


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse token ids that a model has no embedding for, before they index another token's.

    Args:
        tokens: Whole numbers of any shape.
        vocab_size: Of the model.

    Raises:
        UsageError: If an id is below 0 or not below `vocab_size`; the first is named.
    """
    flat = np.asarray(tokens).reshape(-1)
    if not flat.size or 0 <= flat.min() <= flat.max() < vocab_size:
        return
    place = int(np.flatnonzero((flat < 0) | (flat >= vocab_size))[0])
    raise UsageError(
        f"token id {flat[place]} (at position {place}) is outside the model's vocabulary of {vocab_size}: the "
        "tokenizer is not this model's; use the one that the model was trained with"
    )


def begin_windows(tokens: np.ndarray, window: int, prefix: Sequence[int]) -> np.ndarray:
    """Insert a model's prefix, such as BOS, before each window of a stream.

    Cut into windows of `window` tokens, the result has `prefix` at the start of each, followed by the tokens of the
    stream. Where the stream itself has the prefix at the start of a window, as a text with BOS written in it does, it
    is not repeated.

    Args:
        tokens: (T,), one stream.
        window: Tokens of a window, the prefix included.
        prefix: The tokenizer's prefix of a text; if empty, the stream is returned unchanged.

    Returns:
        (T + windows * P,) int32, less the prefixes that the stream already had.

    Raises:
        UsageError: If a window has no room for the prefix and two more tokens, or nothing follows the prefix.
    """
    if not prefix:
        return tokens
    step = window - len(prefix)
    if step < 2:
        raise UsageError(f"window {window} has no room for {len(prefix)} tokens before a text; give a longer window")
    first, parts, start = np.asarray(prefix, np.int32), [], 0
    while start < len(tokens):
        if np.array_equal(tokens[start : start + len(first)], first):
            start += len(first)
        if start < len(tokens):
            parts += [first, tokens[start : start + step]]
        start += step
    if not parts:
        raise UsageError("the text has nothing after its prefix (BOS); give a longer text")
    return np.concatenate(parts).astype(np.int32)


def whole_windows(count: int, window: int, prefix: Sequence[int]) -> int:
    """Round `count` tokens to whole windows if each begins with a prefix: part of a stream must end with a window."""
    return count if not prefix else max(count // window, 1) * window
