"""Answer requests with a model: batched by length, one compiled program for each size.

Batches depend on the requests alone, so that a run that was interrupted continues with the same batches.

Legend: Q contexts of a batch, L tokens of a context, R continuations, T tokens of a continuation, D residual width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.likelihood import cross_entropy, in_chunks
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest, Request, Response
from ngc_jax.models.attention import init_cache
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.generate import bucket, generate
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.types import Params

# Continuations of a batch for each of its contexts.
_CHOICES = 4
# Fewest tokens of a continuation's row: a single token would be written into the cache before it is attended to.
_FEWEST = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that are answered at once, and the function that answers them."""

    requests: tuple[Request, ...]
    answer: Callable[[], list[Response]]


def plan_batches(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], batch_size: int = 8
) -> list[Batch]:
    """Distribute requests over batches of equal shapes; nothing is computed yet.

    Prompts and contexts that are too long for the model lose their first tokens; the response says so ("cut").

    Args:
        model: Dense or compact.
        tokenizer: The model's, for generated texts.
        requests: Of either kind.
        batch_size: Prompts, or contexts, at once.

    Raises:
        UsageError: If a continuation alone is too long, or two requests have the same id.
    """
    if len({request.id for request in requests}) < len(requests):
        raise UsageError("two requests of the task have the same id; give every document one")
    limit = model.config.max_length
    likelihoods = [one for one in requests if isinstance(one, LikelihoodRequest)]
    prompts = [one for one in requests if isinstance(one, GenerationRequest)]
    batches = [
        Batch(rows, partial(_answer_likelihoods, model, rows, sizes, batch_size, limit))
        for sizes, rows in _likelihood_batches(likelihoods, batch_size, limit)
    ]
    for key, group in itertools.groupby(sorted(prompts, key=partial(_prompt_key, limit)), partial(_prompt_key, limit)):
        rows = list(group)
        for some in (tuple(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)):
            batches.append(Batch(some, partial(_answer_prompts, model, tokenizer, some, batch_size, key)))
    return batches


def _context_room(request: LikelihoodRequest, limit: int) -> int:
    """Most tokens of the context. Rows of continuations are padded, but padding has no position."""
    room = limit - len(request.continuation)
    if room < 1:
        raise UsageError(
            f"request {request.id} has {len(request.continuation)} tokens to score, and the model is for {limit}; "
            "shorten the choice"
        )
    return room


def _likelihood_batches(
    requests: Sequence[LikelihoodRequest], batch_size: int, limit: int
) -> Iterator[tuple[tuple[int, int], tuple[LikelihoodRequest, ...]]]:
    """Sizes (L, T) and requests, those with the same context together where they fit."""

    def sizes(request: LikelihoodRequest) -> tuple[int, int]:
        length = min(len(request.context), _context_room(request, limit))
        return bucket(length), bucket(len(request.continuation), smallest=_FEWEST)

    for size, group in itertools.groupby(sorted(requests, key=sizes), sizes):  # stable: contexts remain together
        some: list[LikelihoodRequest] = []
        contexts: set[tuple[int, ...]] = set()
        for request in group:
            context = _context(request, limit)
            if len(some) == _CHOICES * batch_size or (context not in contexts and len(contexts) == batch_size):
                yield size, tuple(some)
                some, contexts = [], set()
            some.append(request)
            contexts.add(context)
        yield size, tuple(some)


def _context(request: LikelihoodRequest, limit: int) -> tuple[int, ...]:
    return tuple(int(token) for token in request.context[-_context_room(request, limit) :])


def _answer_likelihoods(
    model: LanguageModel,
    requests: tuple[LikelihoodRequest, ...],
    sizes: tuple[int, int],
    batch_size: int,
    limit: int,
) -> list[Response]:
    contexts = list(dict.fromkeys(_context(request, limit) for request in requests))
    tokens_QxL, lengths_Q = _rows(contexts, batch_size, sizes[0])
    more_RxT, counts_R = _rows([request.continuation for request in requests], _CHOICES * batch_size, sizes[1])
    owner_R = np.zeros(len(more_RxT), np.int32)
    owner_R[: len(requests)] = [contexts.index(_context(request, limit)) for request in requests]
    arrays = map(jnp.asarray, (tokens_QxL, lengths_Q, owner_R, more_RxT, counts_R))
    found = np.asarray(continuation_log_likelihoods(model.decoder, model.params, *arrays))[: len(requests)]
    if not np.isfinite(found).all():
        raise UsageError(f"{model.name} has log-likelihoods that are not finite; load it in float32 (--dtype float32)")
    return [
        {"log_likelihood": float(value), "tokens": len(request.continuation)}
        | (
            {"cut": len(request.context) - room}
            if (room := _context_room(request, limit)) < len(request.context)
            else {}
        )
        for request, value in zip(requests, found, strict=True)
    ]


def _rows(texts: Sequence[Any], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (rows, width), zeros after the last, and lengths; rows of padding have length 1."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], lengths[row] = text, len(text)
    return tokens, lengths


@partial(jax.jit, static_argnames="decoder")
def continuation_log_likelihoods(
    decoder: Decoder,
    params: Params,
    contexts_QxL: Int[Array, "Q L"],
    lengths_Q: Int[Array, " Q"],
    owner_R: Int[Array, " R"],
    continuations_RxT: Int[Array, "R T"],
    counts_R: Int[Array, " R"],
) -> Float[Array, " R"]:
    """Log-likelihoods of continuations, each after one of the contexts; a context is read once for all of its own.

    Args:
        decoder: The module.
        params: Its parameters.
        contexts_QxL: Token ids, padded on the right with any.
        lengths_Q: Tokens of each context, at least 1.
        owner_R: The context of each continuation.
        continuations_RxT: Token ids, padded on the right with any; T is at least 2.
        counts_R: Tokens of each continuation.

    Returns:
        Nats, float32: the sum over a continuation's tokens.
    """
    assert continuations_RxT.shape[1] > 1, "one token would be written into the cache before it is attended to"
    apply: Callable[..., Any] = partial(decoder.apply, {"params": params}, method="hidden")
    index_L, index_T = jnp.arange(contexts_QxL.shape[1]), jnp.arange(continuations_RxT.shape[1])
    cache = init_cache(decoder.config, len(contexts_QxL), 0, decoder.compute_dtype)
    x_QxLxD, cache = apply(contexts_QxL, jnp.where(index_L < lengths_Q[:, None], index_L, -1), cache)
    last_QxD = jnp.take_along_axis(x_QxLxD, (lengths_Q - 1)[:, None, None], axis=1)[:, 0]
    scored_RxT = index_T < counts_R[:, None]
    positions_RxT = jnp.where(scored_RxT, lengths_Q[owner_R][:, None] + index_T, -1)
    own = jax.tree.map(lambda leaf: leaf[owner_R], cache)
    y_RxTxD, _ = apply(continuations_RxT, positions_RxT, own)
    # What predicts each token: the last hidden state of the context, then those of the tokens before it.
    before_RxTxD = jnp.concatenate([last_QxD[owner_R][:, None], y_RxTxD[:, :-1]], axis=1)

    def score(hidden_RxcxD: Array, targets_Rxc: Array) -> Array:
        return -cross_entropy(decoder.bind({"params": params}).logits(hidden_RxcxD), targets_Rxc)

    return (in_chunks(score, before_RxTxD, continuations_RxT, chunk=64) * scored_RxT).sum(axis=1)


def _prompt_key(limit: int, request: GenerationRequest) -> tuple[int, int, float, float, int]:
    """What prompts of a batch share: padded tokens, tokens to generate, how to sample (top_p 1 for all), the seed."""
    length = bucket(min(len(request.prompt), _room(request, limit)))
    top_p = 1.0 if request.top_p is None else request.top_p
    return length, request.max_new_tokens, request.temperature, top_p, request.seed[0]


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
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: tuple[GenerationRequest, ...],
    batch_size: int,
    key: tuple[int, int, float, float, int],
) -> list[Response]:
    limit = model.config.max_length
    prompts = [request.prompt[-_room(request, limit) :] for request in requests]
    # The last batch is filled up, so that it needs no program of its own.
    filled = [*prompts, *[prompts[-1]] * (batch_size - len(prompts))]
    _, max_new_tokens, temperature, top_p, seed = key
    seeds = [request.seed[1] for request in requests]
    found = generate(
        model,
        filled,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p=top_p),
        key=jax.random.key(seed),
        stop_tokens=tokenizer.stop_tokens,
        seeds=[*seeds, *[seeds[-1]] * (batch_size - len(seeds))],
    )[: len(prompts)]
    responses: list[Response] = []
    for request, prompt, ids in zip(requests, prompts, found, strict=True):
        stopped = len(ids) > 0 and ids[-1] in tokenizer.stop_tokens
        shown = ids[:-1] if stopped and request.special_tokens else ids
        text = tokenizer.decode(shown, skip_special_tokens=not request.special_tokens)
        ends = [place for until in request.until if (place := text.find(until)) >= 0]
        cut = {"cut": len(request.prompt) - len(prompt)} if len(prompt) < len(request.prompt) else {}
        finish = "stop" if stopped or ends else "length"
        responses.append({"text": text[: min(ends)] if ends else text, "tokens": len(ids), "finish": finish, **cut})
    return responses
