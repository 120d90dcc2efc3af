"""Answer requests with a model: batched by length, one compiled program for each size.

Batches depend on the requests alone, so that a run that was interrupted continues with the same batches.

Legend: P tokens of a prefix that all contexts of a batch share, Q contexts, L tokens of a context after it, R
continuations, T tokens of a continuation, D residual width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.batches import LikelihoodBatch, context_room, cut_context, likelihood_batches
from ngc_jax.evaluation.likelihood import cross_entropy, in_chunks
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest, Request, Response
from ngc_jax.models.attention import Cache, init_cache, to_rings
from ngc_jax.models.config import check_length
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.generate import bucket, generate
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.stop_texts import StopTexts
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.types import Params

# Multiplications of a model in the time in which one program is compiled; measured with SmolLM2-135M on two cores of a
# CPU, and a guess for accelerators, which compile as slowly and multiply a thousand times as fast.
_COMPILING = {"cpu": 2.0**38}
_COMPILING_ELSEWHERE = 2.0**48
# Rows of continuations times tokens whose logits exist at once.
_LOGITS = 2048


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that are answered at once, and the function that answers them."""

    requests: tuple[Request, ...]
    answer: Callable[[], list[Response]]


def plan_batches(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    batch_size: int = 8,
    *,
    max_length: int | None = None,
) -> list[Batch]:
    """Distribute requests over batches of few shapes; nothing is computed yet.

    Choices of one context read it once, and so do contexts that begin alike, such as with the same solved examples, if
    that saves time. Prompts and contexts that are too long for the model lose their first tokens; the response says so
    ("cut").

    Args:
        model: Dense or compact.
        tokenizer: The model's, for generated texts.
        requests: Of either kind.
        batch_size: Prompts, or contexts, at once.
        max_length: Most tokens that the model reads at once; None for as many as it was trained on.

    Raises:
        UsageError: If a continuation alone is too long, two requests have the same id, or the model has no positions
            for `max_length` tokens.
    """
    if len({request.id for request in requests}) < len(requests):
        raise UsageError("two requests of the task have the same id; give every document one")
    limit = model.config.max_length if max_length is None else max_length
    check_length(model.config, limit)
    likelihoods = [one for one in requests if isinstance(one, LikelihoodRequest)]
    prompts = [one for one in requests if isinstance(one, GenerationRequest)]
    compiling = _COMPILING.get(jax.default_backend(), _COMPILING_ELSEWHERE) / model.count_parameters()
    prefixes = _Prefixes(model)
    batches = [
        Batch(batch.requests, partial(_answer_likelihoods, model, batch.requests, batch, prefixes, limit))
        for batch in likelihood_batches(likelihoods, batch_size, limit, compiling=compiling)
    ]
    for _, group in itertools.groupby(sorted(prompts, key=partial(_alike, limit)), partial(_alike, limit)):
        rows = list(group)
        for some in (tuple(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)):
            answer = partial(_answer_prompts, model, tokenizer, some, min(batch_size, len(rows)), limit)
            batches.append(Batch(some, answer))
    return batches


class _Prefixes:
    """Reads a shared prefix once for all the batches that follow each other."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._tokens: tuple[int, ...] = ()
        self._cache: Cache | None = None

    def read(self, tokens: tuple[int, ...]) -> Cache | None:
        if tokens != self._tokens:
            self._tokens, self._cache = tokens, None  # of two, one is freed first
            if tokens:
                self._cache = read_prefix(self._model.decoder, self._model.params, jnp.asarray([tokens], jnp.int32))
        return self._cache


def _answer_likelihoods(
    model: LanguageModel,
    requests: tuple[LikelihoodRequest, ...],
    batch: LikelihoodBatch,
    prefixes: _Prefixes,
    limit: int,
) -> list[Response]:
    shape, before = batch.shape, len(batch.prefix)
    cut = [cut_context(request, limit) for request in requests]
    contexts = {context: row for row, context in enumerate(dict.fromkeys(cut))}
    tokens_QxL, lengths_Q = _rows([context[before:] for context in contexts], shape.contexts, shape.length)
    more_RxT, counts_R = _rows([request.continuation for request in requests], shape.rows, shape.width)
    owner_R = np.zeros(shape.rows, np.int32)
    owner_R[: len(requests)] = [contexts[context] for context in cut]
    arrays = map(jnp.asarray, (tokens_QxL, lengths_Q, owner_R, more_RxT, counts_R))
    prefix = prefixes.read(batch.prefix)
    found = continuation_log_likelihoods(model.decoder, model.params, *arrays, prefix)
    likelihoods, greedy = (np.asarray(array)[: len(requests)] for array in found)
    if not np.isfinite(likelihoods).all():
        raise UsageError(f"{model.name} has log-likelihoods that are not finite; load it in float32 (--dtype float32)")
    return [
        {"log_likelihood": float(value), "greedy": bool(is_greedy), "tokens": len(request.continuation)}
        | (
            {"cut": len(request.context) - room}
            if (room := context_room(request, limit)) < len(request.context)
            else {}
        )
        for request, value, is_greedy in zip(requests, likelihoods, greedy, strict=True)
    ]


def _rows(texts: Sequence[Any], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (rows, width), zeros after the last, and lengths; rows of padding have length 1."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], lengths[row] = text, len(text)
    return tokens, lengths


@partial(jax.jit, static_argnames="decoder")
def read_prefix(decoder: Decoder, params: Params, tokens_1xP: Int[Array, "1 P"]) -> Cache:
    """The cache of a prefix, for `continuation_log_likelihoods`."""
    cache = init_cache(decoder.config, 1, 0, decoder.compute_dtype)
    positions_1xP = jnp.arange(tokens_1xP.shape[1])[None]
    apply: Callable[..., Any] = partial(decoder.apply, {"params": params}, method="hidden")
    read: Cache = apply(tokens_1xP, positions_1xP, cache)[1]
    return read


@partial(jax.jit, static_argnames="decoder")
def continuation_log_likelihoods(
    decoder: Decoder,
    params: Params,
    contexts_QxL: Int[Array, "Q L"],
    lengths_Q: Int[Array, " Q"],
    owner_R: Int[Array, " R"],
    continuations_RxT: Int[Array, "R T"],
    counts_R: Int[Array, " R"],
    prefix: Cache | None = None,
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """Log-likelihoods of continuations, each after one of the contexts; a context is read once for all of its own.

    Args:
        decoder: The module.
        params: Its parameters.
        contexts_QxL: Token ids, padded on the right with any.
        lengths_Q: Tokens of each context, at least 1.
        owner_R: The context of each continuation.
        continuations_RxT: Token ids, padded on the right with any; T is not 2.
        counts_R: Tokens of each continuation.
        prefix: Of `read_prefix`, of tokens that precede every context; None for none.

    Returns:
        Nats, float32: the sum over a continuation's tokens; and whether each of its tokens is the likeliest one at its
        place (of equals, the one of the lowest id).
    """
    width = continuations_RxT.shape[1]
    assert width != 2, "the one token that is read would be written into the cache before it is attended to"
    apply: Callable[..., Any] = partial(decoder.apply, {"params": params}, method="hidden")
    index_L, index_T = jnp.arange(contexts_QxL.shape[1]), jnp.arange(width)
    if prefix is None:
        before, cache = 0, init_cache(decoder.config, len(contexts_QxL), 0, decoder.compute_dtype)
    else:
        before = prefix[0].positions.shape[1]
        # Slots of its own for every token: the contexts must not overwrite what their continuations attend to.
        slots = to_rings(decoder.config, prefix, before + contexts_QxL.shape[1])
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(contexts_QxL), axis=0), slots)
    positions_QxL = jnp.where(index_L < lengths_Q[:, None], before + index_L, -1)
    x_QxLxD, cache = apply(contexts_QxL, positions_QxL, cache)
    last_QxD = jnp.take_along_axis(x_QxLxD, (lengths_Q - 1)[:, None, None], axis=1)[:, 0]
    # What predicts each token: the last hidden state of the context, then those of the tokens before it.
    before_RxTxD = last_QxD[owner_R][:, None]
    if width > 1:
        read_RxT = index_T[:-1] < counts_R[:, None] - 1
        positions_RxT = jnp.where(read_RxT, before + lengths_Q[owner_R][:, None] + index_T[:-1], -1)
        own = jax.tree.map(lambda leaf: leaf[owner_R], cache)
        y_RxTxD, _ = apply(continuations_RxT[:, :-1], positions_RxT, own)
        before_RxTxD = jnp.concatenate([before_RxTxD, y_RxTxD], axis=1)

    def score(hidden_RxcxD: Array, targets_Rxc: Array) -> tuple[Array, Array]:
        logits_RxcxV = decoder.bind({"params": params}).logits(hidden_RxcxD)
        return -cross_entropy(logits_RxcxV, targets_Rxc), logits_RxcxV.argmax(axis=-1) == targets_Rxc

    chunk = max(_LOGITS // len(continuations_RxT), 1)
    likelihoods_RxT, likeliest_RxT = in_chunks(score, before_RxTxD, continuations_RxT, chunk=chunk)
    scored_RxT = index_T < counts_R[:, None]
    return (likelihoods_RxT * scored_RxT).sum(axis=1), (likeliest_RxT | ~scored_RxT).all(axis=1)


def _alike(limit: int, request: GenerationRequest) -> tuple[Any, ...]:
    """What prompts of a batch share: padded tokens, and how they are continued."""
    length = bucket(min(len(request.prompt), _room(request, limit)))
    top_p, top_k = 1.0 if request.top_p is None else request.top_p, request.top_k or 0  # None cannot be compared
    return length, request.max_new_tokens, request.until, request.temperature, top_p, top_k, request.seed[0]


def _room(request: GenerationRequest, limit: int) -> int:
    """Most tokens of a prompt."""
    room = limit - request.max_new_tokens
    if room < 1:
        raise UsageError(
            f"max_new_tokens {request.max_new_tokens} leaves no room for a prompt in the model's {limit} tokens; "
            "lower it"
        )
    return room


def _answer_prompts(
    model: LanguageModel, tokenizer: Tokenizer, requests: tuple[GenerationRequest, ...], rows: int, limit: int
) -> list[Response]:
    first = requests[0]
    prompts = [request.prompt[-_room(request, limit) :] for request in requests]
    seeds = [request.seed[1] for request in requests]
    more = rows - len(prompts)  # the last batch is filled up, so that it needs no program of its own
    stops = (*tokenizer.stop_tokens, *special_tokens(tokenizer, first.until))
    found = generate(
        model,
        [*prompts, *[prompts[-1]] * more],
        max_new_tokens=first.max_new_tokens,
        sampling=Sampling(first.temperature, top_p=first.top_p, top_k=first.top_k),
        key=jax.random.key(first.seed[0]),
        stop_tokens=stops,
        seeds=[*seeds, *[seeds[-1]] * more],
        stop_texts=StopTexts(tokenizer, first.until) if first.until else None,
    )[: len(prompts)]
    responses: list[Response] = []
    for request, prompt, ids in zip(requests, prompts, found, strict=True):
        stopped = len(ids) > 0 and ids[-1] in stops
        shown = ids[:-1] if stopped and request.special_tokens else ids
        text = tokenizer.decode(shown, skip_special_tokens=not request.special_tokens)
        ends = [place for until in request.until if (place := text.find(until)) >= 0]
        cut = {"cut": len(request.prompt) - len(prompt)} if len(prompt) < len(request.prompt) else {}
        finish = "stop" if stopped or ends else "length"
        responses.append({"text": text[: min(ends)] if ends else text, "tokens": len(ids), "finish": finish, **cut})
    return responses


def special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Those of the texts that are a special token, as ids: generated texts do not show them."""
    encoded = [tokenizer.encode(text) for text in texts]
    return [int(ids[0]) for ids in encoded if len(ids) == 1 and not tokenizer.decode(ids, skip_special_tokens=True)]
