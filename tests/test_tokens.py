"""Streams of token ids, and BOS before every window: against plain loops over windows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from ngc_jax import cli
from ngc_jax.convert.pipeline import convert
from ngc_jax.convert.recipe import Recipe
from ngc_jax.convert.statistics import calibrate
from ngc_jax.errors import UsageError
from ngc_jax.evaluate.perplexity import measure_perplexity
from ngc_jax.models.generate import generate
from ngc_jax.models.save import save_model
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.text import split_windows
from ngc_jax.tokens import as_tokens, begin_windows, check_ids, whole_windows
from ngc_jax.train.data import DataConfig, make_pipeline
from ngc_jax.train.packing import TokenDocument
from tests.tiny import forward, random_tokens, tiny_model, tiny_tokenizer

BOS, WINDOW = 257, 16  # <user> of the tiny tokenizer
TOKENS = random_tokens(50)
SVD_LLM = Recipe("svd_llm", keep=0.5)


def bos_tokenizer(*after: str) -> Tokenizer:
    """The tiny tokenizer, whose own rule puts <user> before a text."""
    fast = tiny_tokenizer()._fast
    fast.add_special_tokens({"bos_token": "<user>"})
    special = [("<user>", BOS), ("<eos>", 256)]
    framed = " ".join(["<user>", "$A", *after])
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=framed, special_tokens=special)
    return Tokenizer(fast)


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(tiny_model(), load_tokenizer=bos_tokenizer)


def windows_of(tokens, prefix):
    """A plain loop: every window begins with the prefix."""
    step = WINDOW - len(prefix)
    return [np.concatenate([prefix, tokens[i : i + step]]).astype(np.int32) for i in range(0, len(tokens), step)]


# --- what the tokenizer says ------------------------------------------------------------------------------------


def test_what_comes_before_a_text_is_the_tokenizers_own_rule():
    assert tiny_tokenizer().prefix() == ()
    for tokenizer in (bos_tokenizer(), bos_tokenizer("<eos>")):  # nothing is said of what comes after
        assert tokenizer.prefix() == tokenizer.prefix("always") == (BOS,)
        assert tokenizer.prefix("never") == ()
    with pytest.raises(UsageError, match="no BOS token"):
        tiny_tokenizer().prefix("always")


def test_a_prompt_gets_bos_once_and_no_end():
    tokenizer = bos_tokenizer("<eos>")
    plain = tokenizer.encode("Hi").tolist()
    assert tokenizer.encode_prompt("Hi").tolist() == [BOS, *plain]
    assert tokenizer.encode_prompt("<user>Hi").tolist() == [BOS, *plain]
    assert tokenizer.encode_prompt("Hi", "never").tolist() == plain
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]).tolist().count(BOS) == 1


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [(), (BOS,), (BOS, 256)])
def test_every_window_begins_with_the_prefix(prefix):
    stream = begin_windows(TOKENS, WINDOW, prefix)
    (cut,) = split_windows(stream, WINDOW, batch_size=100)[:1]
    for row, positions, expected in zip(*cut, windows_of(TOKENS, prefix), strict=False):
        np.testing.assert_array_equal(row[positions >= 0], expected)
    assert whole_windows(40, WINDOW, prefix) == (32 if prefix else 40)


def test_a_window_without_room_is_refused():
    with pytest.raises(UsageError, match="no room"):
        begin_windows(TOKENS, 2, (BOS,))


@pytest.mark.parametrize("bos", ["auto", "never", "always"])
def test_perplexity_is_that_of_a_loop_over_windows(model, bos):
    tokenizer = bos_tokenizer()
    prefix = tokenizer.prefix(bos)
    nats, scored, size = 0.0, 0, 0
    for window in windows_of(TOKENS, prefix):
        logits = np.asarray(forward(model.params, window[None], decoder=model.decoder)[0], np.float64)[0]
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        first = max(len(prefix), 1)
        nats -= sum(logits[i - 1, window[i]] for i in range(first, len(window)))
        scored += len(window) - first
        size += len(tokenizer.decode(window[first:]).replace("\ufffd", "?").encode())
    found = measure_perplexity(model, TOKENS, tokenizer=tokenizer, window=WINDOW, bos=bos)
    assert found.tokens == scored == (50 if prefix else 50 - 4)
    assert found.perplexity == pytest.approx(np.exp(nats / scored), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_conversion_reads_bos_before_every_window(model):
    never = dataclasses.replace(model, load_tokenizer=tiny_tokenizer)
    explicit = convert(never, SVD_LLM, np.concatenate(windows_of(TOKENS, (BOS,))), window=WINDOW, bos="never")
    found = convert(model, SVD_LLM, TOKENS, window=WINDOW)
    without = convert(model, SVD_LLM, TOKENS, window=WINDOW, bos="never")
    same = [jnp.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (explicit.params, found.params)), strict=True)]
    assert all(same)
    (_, ours), *_ = calibrate(model.config, model.params, np.concatenate(windows_of(TOKENS, (BOS,))), window=WINDOW)
    assert ours["layers.0.attn.q"].count == 50 + 4
    name = found.plan.groups[0].name
    assert not jnp.array_equal(*(one.params["groups"][name]["input_states"] for one in (found, without)))


@pytest.mark.parametrize("packing", ["concatenate", "pack"])
def test_rows_of_training_begin_documents_with_bos(packing):
    documents = [TokenDocument(random_tokens(count, seed=count)) for count in (9, 40, 5)]
    documents.append(TokenDocument(np.array([BOS, 1, 2, 3], np.int32)))  # has its own
    config = DataConfig(
        sources=("made",),
        sequence_length=WINDOW,
        batch_size=1,
        packing=packing,
        end_token=False,
        shuffle=False,
        epochs=1,
    )
    rows = list(make_pipeline(config, bos_tokenizer(), given={"made": documents}))
    kept = []
    for row in rows:
        tokens, starts, weights = (row[name][0] for name in ("tokens", "starts", "weights"))
        valid = row["positions"][0] >= 0
        for start in np.unique(starts[valid]):
            piece = valid & (starts == start)
            assert tokens[start] == BOS
            assert weights[start] == 0
            assert (weights[piece][1:] == 1).all() or (tokens[piece] == BOS).all()
            kept += tokens[piece][tokens[piece] != BOS].tolist()
    expected = np.concatenate([d.tokens[d.tokens != BOS] for d in documents]).tolist()
    if packing == "pack":  # the long one is cut
        expected = [*documents[0].tokens, *documents[1].tokens[: WINDOW - 1], *documents[2].tokens, 1, 2, 3]
        assert sorted(kept) == sorted(expected)
    else:
        assert kept == expected


def test_without_bos_rows_are_what_they_were():
    config = DataConfig(
        sources=("made",), sequence_length=WINDOW, batch_size=1, end_token=False, shuffle=False, epochs=1
    )
    rows = list(make_pipeline(config, tiny_tokenizer(), given={"made": [TokenDocument(TOKENS)]}))
    np.testing.assert_array_equal(np.concatenate([row["tokens"][0] for row in rows])[:50], TOKENS)


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    return str(save_model(model, tmp_path_factory.mktemp("bos") / "model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("bos") / "text.txt"
    path.write_text("Groups of neurons tell others what they see. " * 9)
    return str(path)


def summary_of(arguments, tmp_path):
    assert cli.main([*arguments, "--json", str(tmp_path / "summary.json")]) == 0
    return json.loads((tmp_path / "summary.json").read_text())


def test_commands_record_what_comes_before_a_text(directory, text, tmp_path):
    evaluate = ["evaluate", directory, "--text", text, "--window", "32", "--max-tokens", "64"]
    auto, never = (summary_of([*evaluate, "--bos", bos], tmp_path) for bos in ("auto", "never"))
    assert (auto["prefix"], auto["tokens"]) == ([BOS], 64)
    assert (never["prefix"], never["tokens"]) == ([], 62)
    assert auto["perplexity"] != never["perplexity"]
    convert_it = ["convert", directory, "--text", text, "--method", "svd_llm", "--window", "32", "--out"]
    assert summary_of([*convert_it, str(tmp_path / "out")], tmp_path)["calibration"]["prefix"] == [BOS]
    assert summary_of(["generate", directory, "--prompt", "a", "--max-new-tokens", "2"], tmp_path)["prefix"] == [BOS]


def test_another_tokenizer_takes_the_place_of_a_models_own(directory, text, tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer")
    options = ["--text", text, "--window", "32", "--tokenizer", str(tmp_path / "tokenizer")]
    assert summary_of(["evaluate", directory, *options], tmp_path)["prefix"] == []


# --- ids and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [[1, 2, 259], [1, -1, 2]])
def test_ids_outside_the_vocabulary_are_refused_wherever_they_come_in(model, wrong):
    tokens = np.asarray(wrong * 10)
    for use in (
        lambda: measure_perplexity(model, tokens, tokenizer=tiny_tokenizer()),
        lambda: convert(model, SVD_LLM, tokens),
        lambda: generate(model, [tokens], max_new_tokens=2),
        lambda: check_ids(tokens[None], 259),
    ):
        with pytest.raises(UsageError, match="outside the model's vocabulary of 259"):
            use()
    with pytest.raises(UsageError, match=r"token id 259 \(at position 2\) is outside the model's vocabulary of 259"):
        check_ids(np.asarray([1, 2, 259]), 259)


def test_a_tokenizer_that_is_not_the_models_is_named_by_every_command(text, tmp_path, capsys):
    directory = str(save_model(tiny_model(), tmp_path / "model"))
    larger = tiny_tokenizer()._fast
    larger.add_tokens(["others"])
    Tokenizer(larger).save(tmp_path / "larger")
    given = ["--text", text, "--tokenizer", str(tmp_path / "larger")]
    for command in (
        ["evaluate", directory, *given],
        ["convert", directory, *given, "--method", "svd_llm", "--out", str(tmp_path / "out")],
        ["convert", directory, *given, "--out", str(tmp_path / "out")],
        ["generate", directory, *given[2:], "--prompt", "others"],
        ["stability", directory, *given[2:], "--prompt", "others and others", "--out", str(tmp_path / "stability")],
        ["distil", directory, "--teacher", directory, "--trainable", "all", *given, "--out", str(tmp_path / "run")],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "259" in error
        assert "vocabulary" in error
    svd = ["convert", directory, *given[2:], "--method", "svd", "--out", str(tmp_path / "out")]
    assert cli.main(svd) == 0
    assert "the tokenizer has 260 tokens and the model embeds 259" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        TOKENS,
        TOKENS[None],
        TOKENS.tolist(),
        [TOKENS.tolist()],
        jnp.asarray(TOKENS),
        TOKENS.astype(np.int64),
    ],
)
def test_what_a_person_would_try_is_accepted(given):
    np.testing.assert_array_equal(as_tokens(given, 259), TOKENS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TOKENS[:48].reshape(2, 24), r"shape \(2, 24\)"),
        ([[1, 2], [3]], "different lengths"),
        ([0.5, 1.0], "type float64"),
        ([True, False], "type bool"),
        (["a", "b"], "type <U1"),
        ("text", r"shape \(\)"),
        (None, r"shape \(\)"),
        ([], "there are 0 tokens"),
    ],
)
def test_what_is_no_stream_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        as_tokens(given, 259)


def test_convert_takes_a_text(model):
    text = "Groups of neurons tell others what they see."
    one, other = convert(model, SVD_LLM, text), convert(model, SVD_LLM, model.load_tokenizer().encode(text)[None])
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, one.params, other.params)))
