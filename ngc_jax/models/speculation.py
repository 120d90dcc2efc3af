"""Speculative decoding: a small model drafts a few tokens, and the model itself reads them all at once.

In a round the drafter proposes K tokens, one after the other. The model reads them in one pass, which costs little more
than reading one where weights are what a step waits for, and chooses its own token at each of their positions. Drafted
tokens stand as long as they are the model's choice too; the first that is not is replaced by the model's, and the rest
are dropped. So a round yields 1 to K + 1 tokens, and every one of them is the model's own choice.

A token is chosen from its logits and the key of its row and position alone (`decoding`), greedily or by the Gumbel
trick. The drafter chooses with the same keys. Sampled tokens are therefore the very ones that `generate` samples
without a drafter, up to rounding of the logits, and not only equal in distribution, as with the rejection of Leviathan
et al. (2023, arXiv 2211.17192), which lets drafts stand at least as often.

Legend: B batch, L prompt tokens with padding, K drafted tokens, V vocabulary, Z stop tokens, T tokens of a call.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ngc_jax.errors import UsageError
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import MAX_STEPS, NO_TOKEN, DecodeState, apply, choose, prefill
from ngc_jax.models.latent_cache import MixedCache
from ngc_jax.models.load import Drafter, LanguageModel
from ngc_jax.models.sampling import SamplingArrays
from ngc_jax.types import Params


def with_drafter(model: LanguageModel, draft: LanguageModel, tokens: int = 4) -> LanguageModel:
    """A model that generates with the help of a smaller one: the same tokens, in fewer passes.

    Whether that is faster depends on how much faster the drafter is and how often both agree; measure it with
    `python -m experiments.speculation`.

    Args:
        model: The model.
        draft: The drafter, with the same tokenizer: usually a conversion of the model.
        tokens: K, 1 to 16.

    Raises:
        UsageError: If the vocabularies differ, a number is out of range, a layer of either has a sliding window, whose
            cache would lose tokens to those that are dropped, or either has a table of positions, beyond which drafts
            would reach at its end.

    Example:
        >>> fast = with_drafter(model, compact)
        >>> from ngc_jax import generate
        >>> one, other = (generate(m, "Groups of", max_new_tokens=9)[0].tolist() for m in (model, fast))
        >>> one == other
        True
    """
    if model.config.vocab_size != draft.config.vocab_size:
        raise UsageError(
            f"the drafter knows {draft.config.vocab_size:,} tokens and the model {model.config.vocab_size:,}; expected "
            "a model with the same tokenizer, such as a conversion of the model"
        )
    if not 1 <= tokens <= 16:
        raise UsageError(f"draft tokens is {tokens}; expected 1 to 16")
    for one in (model, draft):
        if any(window is not None for window in one.config.windows):
            raise UsageError(f"{one.name} has layers with sliding windows, which speculative decoding does not support")
        if one.config.learned_positions:
            raise UsageError(f"{one.name} has a table of positions, which speculative decoding does not support")
    return dataclasses.replace(model, drafter=Drafter(draft, tokens))


class SpeculationState(NamedTuple):
    """The state of decoding a batch with a drafter.

    Attributes:
        decode: The model's; its cache may have tokens that were dropped, at the last token's position and after it.
        cache: The drafter's, likewise.
        previous: (B,) the token before the last.
        rounds: (B,) rounds that each row took part in.
    """

    decode: DecodeState
    cache: MixedCache
    previous: Int[Array, B]
    rounds: Int[Array, B]

    @property
    def remaining(self) -> Int[Array, B]:
        """(B,) number of tokens the row may still emit."""
        return self.decode.remaining


def begin_drafting(
    drafter: LanguageModel,
    state: DecodeState,
    tokens_BxL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    capacity: int,
) -> SpeculationState:
    """The state after the first tokens, from that of the model alone.

    Args:
        drafter: The drafter.
        state: From `decoding.begin`.
        tokens_BxL: Prompts, padded on the right with any token.
        lengths_B: Number of tokens in each prompt, without padding.
        capacity: Slots of the caches: the longest sequence in tokens, and K.
    """
    _, cache = prefill(drafter.decoder, drafter.params, tokens_BxL, lengths_B, capacity)
    previous_B = jnp.take_along_axis(tokens_BxL, (lengths_B - 1)[:, None], axis=1)[:, 0]
    return SpeculationState(state, cache, previous_B, jnp.zeros_like(lengths_B))


def speculate_steps(
    model: LanguageModel, state: SpeculationState, steps: int, stop_Z: Int[Array, " Z"], sampling: SamplingArrays
) -> tuple[Int[Array, "B T"], SpeculationState]:
    """As `speculate`, for as many rounds as yield at least `steps` tokens where all drafts stand."""
    assert model.drafter is not None
    drafter, tokens = model.drafter.model, model.drafter.tokens
    decoders, params = (model.decoder, drafter.decoder), (model.params, drafter.params)
    rounds = jnp.int32(-(-steps // (tokens + 1)))
    return speculate(decoders, params, state, rounds, stop_Z, sampling=sampling, tokens=tokens)


@partial(jax.jit, static_argnames=("decoders", "tokens"), donate_argnames="state")
def speculate(
    decoders: tuple[Decoder, Decoder],
    params: tuple[Params, Params],
    state: SpeculationState,
    rounds: Int[Array, ""],
    stop_Z: Int[Array, Z],
    *,
    sampling: SamplingArrays,
    tokens: int,
) -> tuple[Int[Array, "B T"], SpeculationState]:
    """Continue a batch on the device, for some rounds or until every row has ended.

    The given state is donated: its caches are updated in place.

    Args:
        decoders: The model and the drafter.
        params: Their parameters.
        state: From `begin_drafting` or an earlier call.
        rounds: Number of rounds, at most T / (K + 1).
        stop_Z: Tokens after which a row ends.
        sampling: How to choose tokens.
        tokens: K.

    Returns:
        Tokens, T the largest multiple of K + 1 up to `MAX_STEPS`, with `NO_TOKEN` between those of two rounds and after
        a row's end; and the new state.
    """
    most, each = MAX_STEPS // (tokens + 1), tokens + 1
    rounds = jnp.minimum(rounds, most)

    def unfinished(carry: tuple[Array, Array, SpeculationState]) -> Array:
        done, _, state = carry
        return (done < rounds) & (state.decode.remaining > 0).any()

    def advance(carry: tuple[Array, Array, SpeculationState]) -> tuple[Array, Array, SpeculationState]:
        done, emitted_BxT, state = carry
        chosen_BxE, state = _round(decoders, params, state, stop_Z, sampling, tokens)
        return done + 1, jax.lax.dynamic_update_slice(emitted_BxT, chosen_BxE, (0, done * each)), state

    nothing_BxT = jnp.full((state.previous.shape[0], most * each), NO_TOKEN, jnp.int32)
    _, emitted_BxT, state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), nothing_BxT, state))
    return emitted_BxT, state


def _round(
    decoders: tuple[Decoder, Decoder],
    params: tuple[Params, Params],
    state: SpeculationState,
    stop_Z: Array,
    sampling: SamplingArrays,
    tokens: int,
) -> tuple[Array, SpeculationState]:
    """Draft and read once; the tokens (B, K + 1) with `NO_TOKEN` after those that stand."""
    (decoder, drafter), (own, drafters), before = decoders, params, state.decode
    active_B = before.remaining > 0
    # A row that has ended is padding in the rounds of the others.
    last_at_B = jnp.where(active_B, before.positions, -1)
    drafted_BxK, cache = _draft(drafter, drafters, state, last_at_B, sampling, tokens)
    read_BxE = jnp.concatenate([before.tokens[:, None], drafted_BxK], axis=1)
    index_E = jnp.arange(tokens + 1)
    read_at_BxE = jnp.where(active_B[:, None], last_at_B[:, None] + index_E, -1)
    logits_BxExV, own_cache = apply(
        decoder, own, "__call__", read_BxE, read_at_BxE, _before(before.cache, before.positions)
    )
    chosen_BxE = jax.vmap(choose, in_axes=(None, 1, 1, None), out_axes=1)(
        before.keys, read_at_BxE + 1, logits_BxExV, sampling
    )
    agreed_B = jnp.cumprod(chosen_BxE[:, :-1] == drafted_BxK, axis=1).sum(axis=1)
    stops_BxE = jnp.isin(chosen_BxE, stop_Z)
    stands_BxE = (index_E <= agreed_B[:, None]) & (index_E < before.remaining[:, None])
    stands_BxE &= jnp.cumsum(stops_BxE, axis=1) - stops_BxE == 0
    count_B = stands_BxE.sum(axis=1)  # 0 for a row that has ended
    # The last two tokens of each row: of the last token and the chosen ones, those at count - 1 and count.
    both_BxE = jnp.concatenate([before.tokens[:, None], chosen_BxE], axis=1)

    def at(index_B: Array) -> Array:
        return jnp.take_along_axis(both_BxE, index_B[:, None], axis=1)[:, 0]

    stopped_B = (stops_BxE & stands_BxE).any(axis=1)
    after = DecodeState(
        own_cache,
        at(count_B),
        before.positions + count_B,
        jnp.where(stopped_B, 0, before.remaining - count_B),
        before.keys,
    )
    previous_B = jnp.where(count_B > 0, at(jnp.maximum(count_B - 1, 0)), state.previous)
    return jnp.where(stands_BxE, chosen_BxE, NO_TOKEN), SpeculationState(
        after, cache, previous_B, state.rounds + active_B
    )


def _draft(
    drafter: Decoder,
    params: Params,
    state: SpeculationState,
    last_at_B: Array,
    sampling: SamplingArrays,
    tokens: int,
) -> tuple[Array, MixedCache]:
    """The drafter's K tokens, and its cache."""
    decode = state.decode
    # Two tokens: where all of a round's drafts stood, the drafter has not read the last of them.
    read_Bx2 = jnp.stack([state.previous, decode.tokens], axis=1)
    read_at_Bx2 = jnp.where(last_at_B[:, None] < 0, -1, last_at_B[:, None] + jnp.array([-1, 0]))
    cache = _before(state.cache, decode.positions - 1)
    logits_Bx2xV, cache = apply(drafter, params, "__call__", read_Bx2, read_at_Bx2, cache)
    first_B = choose(decode.keys, last_at_B + 1, logits_Bx2xV[:, 1], sampling)

    def next_token(carry: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], Array]:
        token_B, cache = carry
        read_at_B = jnp.where(last_at_B < 0, -1, last_at_B + index)
        logits_Bx1xV, cache = apply(drafter, params, "__call__", token_B[:, None], read_at_B[:, None], cache)
        token_B = choose(decode.keys, read_at_B + 1, logits_Bx1xV[:, 0], sampling)
        return (token_B, cache), token_B

    (_, cache), others_KxB = jax.lax.scan(next_token, (first_B, cache), jnp.arange(1, tokens))
    return jnp.concatenate([first_B[:, None], others_KxB.T], axis=1), cache


def _before(cache: MixedCache, positions_B: Int[Array, " B"]) -> MixedCache:
    """A cache without the tokens from some positions on."""
    return tuple(
        layer._replace(positions=jnp.where(layer.positions < positions_B[:, None], layer.positions, -1))
        for layer in cache
    )
