"""Streams of token ids, and BOS before every window: against plain loops over windows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from ngc_jax import cli
from ngc_jax.commands.training import TrainingOptions
from ngc_jax.commands.training_rows import prefix_of, rows_of
from ngc_jax.conversion import Recipe, remeasuring
from ngc_jax.conversion.fisher import measure_fisher
from ngc_jax.conversion.output_gradients import measure_output_gradients
from ngc_jax.conversion.pipeline import convert
from ngc_jax.conversion.remeasuring import tokens_again
from ngc_jax.conversion.state import Calibration, ConversionState
from ngc_jax.conversion.statistics import calibrate
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.groups.plan import Plan
from ngc_jax.models.generate import generate
from ngc_jax.models.save import save_model
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.text import split_windows
from ngc_jax.tokens import as_tokens, begin_windows, check_ids, whole_windows
from ngc_jax.training import sharding
from ngc_jax.training.data import DataConfig, make_pipeline
from ngc_jax.training.evaluation import perplexity_on
from ngc_jax.training.packing import TokenDocument
from ngc_jax.training.trainable import split_params
from tests.conversion.helpers import factorise_of
from tests.tiny import forward, random_tokens, tiny_model, tiny_tokenizer

BOS, WINDOW = 257, 16  # <user> of the tiny tokenizer
TOKENS = random_tokens(50)
SVD_LLM = Recipe("svd_llm", keep=0.5)


def bos_tokenizer(*after: str) -> Tokenizer:
    """The tiny tokenizer, whose own rule puts <user> before a text."""
    fast = tiny_tokenizer()._fast
    special = [("<user>", BOS), ("<eos>", 256)]
    framed = " ".join(["<user>", "$A", *after])
    fast.backend.post_processor = processors.TemplateProcessing(single=framed, special_tokens=special)
    return Tokenizer(dataclasses.replace(fast, special_tokens={**fast.special_tokens, "bos_token": "<user>"}))


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
    with pytest.raises(UsageError, match="nothing after"):
        begin_windows(np.array([BOS]), WINDOW, (BOS,))


@pytest.mark.parametrize("at", [0, WINDOW - 1, 2 * (WINDOW - 1), len(TOKENS)])
def test_bos_that_a_window_begins_with_is_not_repeated(at):
    """Documents may have been joined with BOS before each."""
    written = np.insert(TOKENS, at, BOS)
    expected = begin_windows(TOKENS, WINDOW, (BOS,))
    if at == len(TOKENS):  # in the middle of the last window it is a token like others
        expected = np.append(expected, BOS)
    np.testing.assert_array_equal(begin_windows(written, WINDOW, (BOS,)), expected)


def test_a_text_with_bos_written_in_it_is_scored_as_without(model):
    texts = ("Groups of neurons", "<user>Groups of neurons")
    one, other = (measure_perplexity(model, text, tokenizer=bos_tokenizer(), window=WINDOW) for text in texts)
    assert dataclasses.replace(one, tokens_per_second=0) == dataclasses.replace(other, tokens_per_second=0)


@pytest.mark.parametrize("count", [20, 50, 100])
def test_gradients_are_measured_again_on_whole_windows(model, monkeypatch, count):
    read = []

    def gradients(model, calibration, what, **options):
        read.append(calibration.tokens)
        raise InterruptedError

    monkeypatch.setattr(remeasuring, "measure_output_gradients", gradients)
    stream, recipe = begin_windows(random_tokens(count), WINDOW, (BOS,)), Recipe("ngc", rounds=1, propagation=0.0)
    compact = dataclasses.replace(model, plan=Plan())
    for prefix in ((BOS,), ()):
        calibration = Calibration(stream, WINDOW, prefix=prefix, gradient_tokens=3 * WINDOW)
        state = ConversionState(model, recipe.keep, recipe.chain, calibration, [], compact)
        with pytest.raises(InterruptedError):
            remeasuring.remeasured(state, factorise_of(recipe), sensitivities=True)
    begins, as_ever = read
    assert (begins[::WINDOW] == BOS).all()
    np.testing.assert_array_equal(as_ever, tokens_again(stream, 3 * WINDOW))


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_perplexity_while_training_is_that_of_an_evaluation(model, bos):
    tokenizer, mesh = bos_tokenizer(), sharding.make_mesh(devices=jax.local_devices()[:1])
    trained, frozen = split_params(model.params, "all")
    found = perplexity_on(TOKENS, tokenizer.prefix(bos), model.decoder, frozen, mesh)(trained)["perplexity"]
    expected = measure_perplexity(model, TOKENS, tokenizer=tokenizer, bos=bos)
    assert found == pytest.approx(expected.perplexity, rel=1e-5)


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
    (_, ours), *_ = calibrate(model, Calibration(np.concatenate(windows_of(TOKENS, (BOS,))), WINDOW))
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


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, (BOS,)),
        ({"bos": "never"}, ()),
        ({"data_options": {"begin_token": False}}, ()),
        ({"bos": "never", "data_options": {"begin_token": True}}, (BOS,)),
    ],
)
def test_a_training_run_evaluates_with_what_its_rows_begin_with(text, options, prefix):
    run = TrainingOptions(out="run", text=text, sequence_length=WINDOW, **options)
    assert prefix_of(run, bos_tokenizer()) == prefix
    row = next(iter(rows_of(run, bos_tokenizer(), 259)))["tokens"][0]
    assert (row[0] == BOS) == bool(prefix)


def test_a_chat_needs_no_bos_of_its_own(tmp_path):
    directory = str(save_model(tiny_model(), tmp_path / "model"))
    given = ["generate", directory, "--chat", "--bos", "always", "--prompt", "a", "--max-new-tokens", "2"]
    summary = summary_of(given, tmp_path)
    assert (summary["bos"], summary["prefix"]) == ("always", [])


def test_samples_of_a_report_begin_with_bos(directory, tmp_path, monkeypatch):
    read = []

    def spy(model, prompts, **options):
        read.append([prompt.tolist() for prompt in prompts])
        return prompts

    monkeypatch.setattr("ngc_jax.models.generate.generate", spy)
    for bos in ("auto", "never"):
        out = ["--out", str(tmp_path / f"{bos}.html"), "--bos", bos]
        assert summary_of(["report", directory, "--prompt", "a", *out], tmp_path)["bos"] == bos
    plain = bos_tokenizer().encode("a").tolist()
    assert read == [[[BOS, *plain]], [plain]]


def test_commands_record_what_comes_before_a_text(directory, text, tmp_path):
    evaluate = ["evaluate", directory, "--text", text, "--window", "32", "--max-tokens", "64"]
    auto, never = (summary_of([*evaluate, "--bos", bos], tmp_path) for bos in ("auto", "never"))
    assert (auto["prefix"], auto["tokens"]) == ([BOS], 64)
    assert (never["prefix"], never["tokens"]) == ([], 62)
    assert auto["perplexity"] != never["perplexity"]
    convert_it = ["convert", directory, "--text", text, "--method", "svd_llm", "--window", "32", "--out"]
    calibration = summary_of([*convert_it, str(tmp_path / "out")], tmp_path)["calibration"]
    assert (calibration["bos"], calibration["prefix"]) == ("auto", [BOS])
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
        lambda: list(calibrate(model, Calibration(tokens))),
        lambda: measure_output_gradients(model, Calibration(tokens)),
        lambda: measure_fisher(model, tokens),
        lambda: check_ids(tokens[None], 259),
    ):
        with pytest.raises(UsageError, match="outside the model's vocabulary of 259"):
            use()
    with pytest.raises(UsageError, match=r"token id 259 \(at position 2\) is outside the model's vocabulary of 259"):
        check_ids(np.asarray([1, 2, 259]), 259)


def test_a_tokenizer_that_is_not_the_models_is_named_by_every_command(text, tmp_path, capsys):
    directory = str(save_model(tiny_model(), tmp_path / "model"))
    larger = tiny_tokenizer()._fast
    larger.backend.add_tokens(["others"])
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


@pytest.mark.parametrize("measure", [calibrate, measure_output_gradients])
def test_what_is_no_stream_is_refused_where_it_is_measured(model, measure):
    with pytest.raises(UsageError, match=r"shape \(2, 24\)"):
        list(measure(model, Calibration(TOKENS[:48].reshape(2, 24))))
