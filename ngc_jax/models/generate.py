"""Text generation: continue prompts in a batch, or one of them as a stream of tokens or text.

A prompt's key is the given key with the prompt's seed folded in, and its seed is its index by default: its continuation
does not depend on its batch.

Shapes are rounded up to a few sizes (`bucket`) so that few programs are compiled. Everything else that varies from call
to call (lengths, steps, stop tokens, keys) is an argument of the program.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig, language_only
from ngc_jax.models.decoding import MAX_STEPS, NO_TOKEN, DecodeState, begin, decode, end_rows
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.speculation import SpeculationState, begin_drafting, speculate_steps
from ngc_jax.models.stop_texts import StopTexts
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import as_rows, check_ids

Prompt = np.ndarray | Array | Sequence[int] | str
GREEDY = Sampling()
# Number of tokens after which the host looks for stop texts; a row decodes that many in vain, at most.
_STEPS_BETWEEN_TEXTS = 16
_REPLACEMENT = "\ufffd"  # the decoding of an incomplete character


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt] | Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
    stop_tokens: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    stop_texts: StopTexts | None = None,
) -> list[np.ndarray]:
    """Continue prompts, all in one batch.

    Args:
        model: The model.
        prompts: Token ids of each, (L,), or its text; see `as_prompts`.
        max_new_tokens: Longest continuation, in tokens.
        sampling: How to choose tokens.
        key: Randomness; may be None if greedy.
        stop_tokens: Tokens after which a continuation ends, usually the tokenizer's `stop_tokens`.
        seeds: One whole number per prompt, folded into the key; None for 0, 1, 2, ...
        stop_texts: Texts after which a continuation ends. They are looked for after every few tokens, so that the
            device does not wait for the host at each.

    Returns:
        The new tokens of each prompt, int32. If a stop token was reached, it is the last; if a stop text, the token
        that completed it.

    Raises:
        UsageError: If a prompt is empty, has tokens that the model does not know or leaves no room for
            max_new_tokens; if max_new_tokens is below 1; if there is no key to sample with.

    Example:
        >>> (continuation,) = generate(model, "Groups of neurons", max_new_tokens=4)
        >>> len(continuation)
        4
        >>> warm = generate(model, ["One", "Two"], max_new_tokens=4, sampling=Sampling(0.8), key=jax.random.key(0))
        >>> len(warm)
        2
    """
    prompts = as_prompts(model, prompts)
    if not prompts:
        return []
    steps = MAX_STEPS if stop_texts is None else _STEPS_BETWEEN_TEXTS
    chunks = _batches(model, prompts, steps, max_new_tokens, sampling, key, stop_tokens, seeds)
    rows = [np.zeros(0, np.int32) for _ in prompts]
    ended = np.zeros(len(prompts), bool)
    with suppress(StopIteration):
        tokens = next(chunks)
        while True:
            for index in np.flatnonzero(~ended):
                before, more = len(rows[index]), tokens[index]
                rows[index] = np.concatenate([rows[index], more[more != NO_TOKEN]])
                end = None if stop_texts is None else stop_texts.end(rows[index], before)
                if end is not None:
                    rows[index], ended[index] = rows[index][:end], True
            tokens = chunks.send(ended)
    return rows


def as_prompts(model: LanguageModel, prompts: Sequence[Prompt] | Prompt) -> list[np.ndarray]:
    """Convert any accepted form of prompts to token ids.

    Args:
        model: The model; its tokenizer encodes texts, with BOS by its own rule.
        prompts: Arrays or lists of whole numbers, (L,) or (1, L) each, and texts; or one of these alone; or (B, L).

    Returns:
        One array for each prompt; ids and lengths are not checked.

    Raises:
        UsageError: If it is none of these.
    """
    encode = None

    def read(text: str) -> np.ndarray:
        nonlocal encode
        encode = encode or model.load_tokenizer().encode_prompt
        return encode(text)

    return as_rows(prompts, read)


def stream(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    steps: int = 4,
) -> Iterator[np.ndarray]:
    """Continue one prompt, a few tokens at a time: the same tokens as `generate`.

    Args:
        model: The model.
        prompt: Token ids, (L,), or a text.
        max_new_tokens: Longest continuation, in tokens.
        sampling: How to choose tokens.
        key: Randomness; may be None if greedy.
        stop_tokens: Tokens after which the continuation ends.
        seed: Folded into the key.
        steps: Number of tokens per chunk, 1 to `MAX_STEPS`; the first token is a chunk by itself.

    Yields:
        The next tokens, int32.

    Raises:
        UsageError: As `generate`.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps is {steps}; expected 1 to {MAX_STEPS}")
    chunks = _batches(model, as_prompts(model, [prompt]), steps, max_new_tokens, sampling, key, stop_tokens, [seed])
    return (row[row != NO_TOKEN] for (row,) in chunks)


def stream_text(
    model: LanguageModel,
    prompt: Prompt,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
    stop_tokens: Sequence[int] | None = None,
    steps: int = 4,
) -> Iterator[str]:
    """As `stream`, but yields text: whole characters, without the stop token.

    Args:
        model: The model.
        prompt: Token ids, (L,), or a text.
        tokenizer: The model's tokenizer.
        max_new_tokens: Longest continuation, in tokens.
        sampling: How to choose tokens.
        key: Randomness; may be None if greedy.
        stop_tokens: Tokens after which the continuation ends; None for the tokenizer's.
        steps: Number of tokens per chunk.

    Yields:
        Text that is not empty.

    Raises:
        UsageError: As `generate`.
    """
    (prompt,) = as_prompts(model, [prompt])
    stops = tokenizer.stop_tokens if stop_tokens is None else stop_tokens
    chunks = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=stops,
        steps=steps,
    )
    return text_pieces(tokenizer, (chunk[~np.isin(chunk, stops)] for chunk in chunks), prompt)


def text_pieces(tokenizer: Tokenizer, chunks: Iterable[np.ndarray], context: np.ndarray | None = None) -> Iterator[str]:
    """Decode a stream of tokens to text; an incomplete character is held until its last byte arrives.

    Args:
        tokenizer: The tokenizer.
        chunks: Token ids, (L,) each.
        context: Tokens before them. Some tokenizers drop the space before the first word of a text.

    Yields:
        Text that is not empty.
    """
    shown_tokens: list[int] = [] if context is None else [int(token) for token in context]
    shown = tokenizer.decode(shown_tokens, skip_special_tokens=True)
    pending: list[int] = []
    for chunk in chunks:
        pending.extend(int(token) for token in chunk)
        text = tokenizer.decode([*shown_tokens, *pending], skip_special_tokens=True)
        if text.endswith(_REPLACEMENT) or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        # Only the last piece of text is kept as context, so that the work per token does not grow with the text.
        shown_tokens, pending = pending, []
        shown = tokenizer.decode(shown_tokens, skip_special_tokens=True)
    rest = tokenizer.decode([*shown_tokens, *pending], skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


def measure_decode_speed(
    model: LanguageModel, *, batch: int = 1, prompt_length: int = 16, repeats: int = 9, seconds: float = 6.0
) -> float:
    """Tokens decoded per second, greedily: the median of several timed chunks.

    Args:
        model: The model.
        batch: Sequences decoded at once.
        prompt_length: Tokens before them.
        repeats: Chunks to time, at most.
        seconds: Stop timing after this time, but not before three chunks.

    Returns:
        Tokens of all sequences per second, without compilation and prompt.

    Raises:
        UsageError: If the model's longest sequence is too short for the measurement.
    """
    model = dataclasses.replace(model, drafter=None)
    steps = 8
    total = prompt_length + 1 + steps * (repeats + 1)
    prompts = [np.arange(row, row + prompt_length) % model.config.vocab_size for row in range(batch)]
    _check(model.config, prompts, total - prompt_length)
    decoder, params, stops = model.decoder, model.params, _stops(())
    _, state = _begin(model, prompts, total - prompt_length, GREEDY, jax.random.key(0), (), range(batch))
    assert isinstance(state, DecodeState)
    rates: list[float] = []
    started = 0.0
    for repeat in range(repeats + 1):
        before = time.perf_counter()
        tokens, state = decode(decoder, params, state, steps, stops, sampling=GREEDY.arrays)
        tokens.block_until_ready()
        now = time.perf_counter()
        if repeat == 0:  # compiles, and brings the weights into the processor's caches
            started = now
            continue
        rates.append(batch * steps / (now - before))
        if len(rates) >= 3 and now - started > seconds:
            break
    return statistics.median(rates)


def bucket(length: int, smallest: int = 16) -> int:
    """Round a length up to one of a few sizes: four per doubling, all of them multiples of `smallest`."""
    step = max(smallest, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _check(config: DecoderConfig, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
    """Raise UsageError unless every prompt can be continued by `max_new_tokens` tokens."""
    language_only(config, "generation")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    for index, prompt in enumerate(map(np.asarray, prompts)):
        shape = prompt.shape
        if len(shape) != 1 or shape[0] == 0:
            raise UsageError(
                f"prompt {index} has shape {shape}; expected a list of at least one token, such as the BOS token"
            )
        if prompt.dtype.kind not in "iu":
            raise UsageError(f"prompt {index} has {prompt.dtype} numbers; expected token ids, which are whole")
        check_ids(prompt, config.vocab_size)
        if shape[0] + max_new_tokens > config.max_length:
            raise UsageError(
                f"prompt {index} has {shape[0]} tokens, which with max_new_tokens {max_new_tokens} is more than the "
                f"model's {config.max_length}; shorten the prompt or lower max_new_tokens"
            )


def _stops(tokens: Sequence[int]) -> Array:
    """Stop tokens as an array of one of few sizes, padded with an invalid token."""
    tokens = [token for token in tokens if 0 <= token < 2**31]  # -1 means no token in some files
    stops = np.full(bucket(max(len(tokens), 1), smallest=8), NO_TOKEN, np.int32)
    stops[: len(tokens)] = tokens
    return jnp.asarray(stops)


def _begin(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    key: Key[Array, ""],
    stop_tokens: Sequence[int],
    seeds: Sequence[int],
) -> tuple[Array, DecodeState | SpeculationState]:
    """`begin` with prompts padded and sizes rounded up; with a drafter, its state too."""
    limit = model.config.max_length
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(prompts), min(bucket(longest), limit)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    capacity = min(bucket(longest + max_new_tokens), limit)
    if model.drafter is not None:
        capacity += model.drafter.tokens
    first, state = begin(
        model.decoder,
        model.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.full(len(prompts), max_new_tokens, jnp.int32),
        jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(seeds, np.int64).astype(np.uint32)),
        _stops(stop_tokens),
        capacity=capacity,
        sampling=sampling.arrays,
    )
    if model.drafter is None:
        return first, state
    return first, begin_drafting(model.drafter.model, state, jnp.asarray(tokens), jnp.asarray(lengths), capacity)


def _batches(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    steps: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: Key[Array, ""] | None,
    stop_tokens: Sequence[int],
    seeds: Sequence[int] | None,
) -> Generator[np.ndarray, np.ndarray | None, None]:
    """Decoded tokens (B, up to about `steps`), until all rows have ended; `NO_TOKEN` where a row has none.

    Rows that are sent back, (B,) bool, end.
    """
    _check(model.config, prompts, max_new_tokens)
    if model.drafter is not None:
        _check(model.drafter.model.config, prompts, max_new_tokens)
    if key is None and not sampling.greedy:
        raise UsageError("sampling at a temperature needs randomness; pass key, for example jax.random.key(0)")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UsageError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; expected one for each")
    key = jax.random.key(0) if key is None else key
    stops = _stops(stop_tokens)

    def chunks(seeds: Sequence[int], key: Key[Array, ""]) -> Generator[np.ndarray, np.ndarray | None, None]:
        first, state = _begin(model, prompts, max_new_tokens, sampling, key, stop_tokens, seeds)
        arrays = sampling.arrays
        ended = yield np.asarray(first)[:, None]
        while True:
            if ended is not None:
                state = end_rows(state, ended)
            if not np.any(state.remaining):
                return
            if isinstance(state, SpeculationState):
                tokens, state = speculate_steps(model, state, steps, stops, arrays)
            else:
                tokens, state = decode(model.decoder, model.params, state, steps, stops, sampling=arrays)
                tokens = tokens[:, :steps]
            ended = yield np.asarray(tokens)

    return chunks(seeds, key)
