"""Perplexity and bits per byte over a stream of tokens."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import scored_sums
from ngc_jax.models.config import check_length, language_only
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.text import split_windows
from ngc_jax.tokens import Bos, as_tokens, begin_windows


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result of an evaluation.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a scored token.
        bits_per_byte: Negative log-likelihood in bits over the UTF-8 bytes of the scored tokens.
        tokens: Scored tokens.
        tokens_per_second: Tokens read per second, without compilation.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_per_second: float


_score = jax.jit(scored_sums, static_argnames=("decoder", "context"))


def measure_perplexity(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    tokenizer: Tokenizer,
    window: int = 1024,
    batch_size: int = 4,
    bos: Bos = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score non-overlapping windows.

    If the tokenizer puts BOS before a text, each window begins with it, and all tokens of the text are scored.
    Otherwise the first token of each window is context only.

    Args:
        model: Dense or compact.
        tokens: (T,), one stream without special tokens, or a text; the last window may be short. See `as_tokens`.
        tokenizer: The model's, to count bytes.
        window: Tokens in a window.
        batch_size: Windows that run at once.
        bos: Start of each window; see `Tokenizer.prefix`.
        progress: Called with (batches done, total).

    Raises:
        UsageError: If fewer than two tokens remain, one is not in the model's vocabulary, the window is below 2 or has
            positions that the model lacks, or the model's log-likelihoods are not finite.
    """
    check_window(window)
    language_only(model.config, "perplexity")
    tokens = as_tokens(tokens, model.config.vocab_size, tokenizer=tokenizer, least=2)
    prefix = tokenizer.prefix(bos)
    stream = begin_windows(tokens, window, prefix)
    check_length(model.config, min(window, len(stream)))
    batches = split_windows(stream, window, batch_size)
    decoder, totals = model.decoder, []
    first = map(jnp.asarray, batches[0])
    score = _score.lower(decoder, model.params, *first, context=max(len(prefix), 1)).compile()
    start = time.perf_counter()
    for done, (batch, positions) in enumerate(batches, start=1):
        totals.append(jax.block_until_ready(score(model.params, batch, positions)))
        if progress is not None:
            progress(done, len(batches))
    seconds = time.perf_counter() - start
    nats = -float(sum(np.asarray(likelihood, np.float64).sum() for likelihood, _ in totals))
    scored = int(sum(np.asarray(count, np.float64).sum() for _, count in totals))
    if not math.isfinite(nats):
        raise UsageError(f"{model.name} has log-likelihoods that are not finite; load it in float32 (--dtype float32)")
    mean = nats / scored
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / scored_bytes(stream, window, tokenizer, len(prefix)),
        tokens=scored,
        tokens_per_second=len(tokens) / seconds,
    )


def evaluate(model: LanguageModel, text: Any, **options: Any) -> Perplexity:
    """The perplexity of a model on a text, with its own tokenizer.

    Args:
        model: Dense or compact.
        text: A text, or token ids (T,).
        options: As of `measure_perplexity`: window, batch_size, bos, progress.

    Raises:
        UsageError: As `measure_perplexity`.

    Example:
        >>> found = evaluate(model, text, window=32)
        >>> found.perplexity > 1, found.tokens
        (True, 968)
    """
    return measure_perplexity(model, text, tokenizer=model.load_tokenizer(), **options)


def check_window(window: int) -> None:
    """Raises UsageError unless a window has a token to score."""
    if window < 2:
        raise UsageError(f"window {window} has no token to score; expected at least 2")


def cut_windows(stream: np.ndarray, window: int, prefix: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """The context and the scored tokens of each window; windows without scored tokens are left out.

    Args:
        stream: (T,), of `begin_windows`.
        window: Tokens in a window.
        prefix: Tokens before the text of each window; without any, its first token is the context.

    Example:
        >>> for context, scored in cut_windows(np.arange(7), 3):
        ...     print(*context, "then", *scored)
        0 then 1 2
        3 then 4 5
    """
    context = max(prefix, 1)
    windows = [stream[start : start + window] for start in range(0, len(stream), window)]
    return [(some[:context], some[context:]) for some in windows if len(some) > context]


def scored_bytes(tokens: np.ndarray, window: int, tokenizer: Tokenizer, prefix: int = 0) -> int:
    """UTF-8 bytes of a stream's scored tokens: all but the prefix of every window, or its first token without one."""

    def size(ids: np.ndarray) -> int:
        # A token can be a part of a character, which decodes to U+FFFD: count it as the single byte that it usually is.
        text = tokenizer.decode(ids)
        return len(text.replace("\ufffd", "?").encode("utf-8"))

    if prefix:
        return max(size(tokens[np.arange(len(tokens)) % window >= prefix]), 1)
    return max(size(tokens) - sum(size(tokens[start : start + 1]) for start in range(0, len(tokens), window)), 1)
