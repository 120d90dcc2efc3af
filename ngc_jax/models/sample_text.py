"""Calibration text that the model generates itself, without any data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Key

from ngc_jax.models.generate import generate
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling


def sample_tokens(
    model: LanguageModel,
    count: int,
    key: Key[Array, ""],
    *,
    length: int = 1024,
    batch_size: int = 32,
    prefix: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sample texts from the model's own distribution, each from one token drawn uniformly from the vocabulary.

    The random first token varies the subjects of the texts (LLM-QAT, arXiv 2305.17888, section 2.1). Texts do not end
    early, since a calibration window has no use for padding.

    Args:
        model: The model.
        count: Tokens to return.
        key: Randomness.
        length: Tokens of each text, without the prefix.
        batch_size: Texts sampled at once.
        prefix: Tokens before each text, such as BOS; not returned.
        progress: Called with (tokens sampled, total).

    Returns:
        (count,) int32, the texts one after the other.
    """
    length = min(length, model.config.max_length - len(prefix), max(count, 2))
    texts = -(-count // length)
    first_key, key = jax.random.split(key)
    first = np.asarray(jax.random.randint(first_key, (texts,), 0, model.config.vocab_size))
    rows: list[np.ndarray] = []
    for start in range(0, texts, batch_size):
        begins = [first[row : row + 1] for row in range(start, min(start + batch_size, texts))]
        prompts = [np.concatenate([np.asarray(prefix, first.dtype), begin]) for begin in begins]
        seeds = range(start, start + len(prompts))
        continued = generate(
            model, prompts, max_new_tokens=length - 1, sampling=Sampling(temperature=1.0), key=key, seeds=seeds
        )
        rows += [np.concatenate([begin, rest]) for begin, rest in zip(begins, continued, strict=True)]
        if progress is not None:
            progress(min(len(rows) * length, count), count)
    return np.concatenate(rows)[:count].astype(np.int32)
