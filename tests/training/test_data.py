import json

import datasets
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.perplexity import split_windows
from ngc_jax.text import read_text
from ngc_jax.training.data import DataConfig, make_pipeline
from ngc_jax.training.packing import TokenDocument
from ngc_jax.training.sources import Document, SourceConfig
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
LENGTH, BATCH = 10, 12
OPEN = []


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def numbered(count):
    """A text in which every row of 10 bytes is another one."""
    return {"numbers": [Document("".join(f"<row {row:03d}>\n" for row in range(count)))]}


def pipeline(process_index=0, process_count=1, given=None, gather=None, **options):
    config = DataConfig(**{"sources": ("numbers",), "sequence_length": LENGTH, "batch_size": BATCH, **options})
    given = numbered(41) if given is None else given
    return make_pipeline(
        config, TOKENIZER, process_index=process_index, process_count=process_count, given=given, gather=gather
    )


def start(*args, **options):
    OPEN.append(iter(pipeline(*args, **options)))
    return OPEN[-1]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"tokens", "positions", "starts", "weights"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def tokens_of(batches):
    return np.concatenate([batch["tokens"] for batch in batches])


def write_files(directory, files=4, rows=9):
    """Files of unequal length whose documents all differ; returns a pattern and the documents of each file."""
    texts = [[f"[{file}.{row}]" * (1 + (3 * row + file) % 4) for row in range(rows + file)] for file in range(files)]
    for file, content in enumerate(texts):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in content)
        (directory / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    return str(directory / "*.jsonl"), texts


def streamed(directory, **options):
    pattern, _ = write_files(directory)
    return {"sources": (SourceConfig(pattern, streaming=True),), "window": 7, "given": {}, **options}


MIXTURE = {
    "sources": (SourceConfig("numbers", weight=3.0), SourceConfig("others")),
    "given": {**numbered(41), "others": [Document(f"other {index}") for index in range(50)]},
}


def setting(name, directory):
    return {
        "table": dict,
        "packed": lambda: {
            "packing": "pack",
            **{k: v for k, v in MIXTURE.items() if k == "given"},
            "sources": ("others",),
        },
        "padded": lambda: {"remainder": "pad"},
        "mixture": lambda: MIXTURE,
        "stream": lambda: streamed(directory),
        "packed stream": lambda: streamed(directory, packing="pack"),
        "stream and table": lambda: {
            **streamed(directory, given=numbered(41)),
            "sources": (SourceConfig(str(directory / "*.jsonl"), streaming=True, weight=2.0), "numbers"),
        },
    }[name]()


SETTINGS = ["table", "packed", "padded", "mixture", "stream", "packed stream", "stream and table"]


def test_without_shuffling_rows_are_the_windows_of_evaluation():
    options = {"sources": ("pydoc:first-half",), "shuffle": False, "epochs": 1, "given": {}, "sequence_length": 64}
    tokens = TOKENIZER.encode(read_text("pydoc:first-half"))[100:5000]
    source = SourceConfig("pydoc:first-half", skip_tokens=100, max_tokens=4900)
    found = list(pipeline(**{**options, "sources": (source,)}, remainder="pad"))
    expected = split_windows(tokens, 64, BATCH)
    assert len(found) == len(expected)
    for batch, (window, positions) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch["positions"], positions)
        known = positions >= 0
        np.testing.assert_array_equal(batch["tokens"][known], window[known])
        np.testing.assert_array_equal(batch["weights"], positions > 0)
        assert not batch["starts"][known].any()


def test_an_epoch_has_every_row_once_and_another_order_than_other_epochs_and_seeds():
    data = pipeline(given=numbered(36))
    assert data.steps_per_epoch == 3
    batches = iter(data)
    epochs = [tokens_of(take(batches, 3)) for _ in range(3)]
    epochs.append(tokens_of(take(start(given=numbered(36), seed=1), 3)))
    rows = [[TOKENIZER.decode(row) for row in epoch] for epoch in epochs]
    for order in rows:
        assert sorted(order) == [f"<row {row:03d}>\n" for row in range(36)]
    assert len({tuple(order) for order in rows}) == 4
    assert_equal_batches(take(iter(data), 3), take(start(given=numbered(36)), 3))


@pytest.mark.parametrize(("remainder", "steps", "rows"), [("drop", 3, 36), ("pad", 4, 41)])
def test_an_epochs_remainder_is_dropped_or_padded(remainder, steps, rows):
    data = pipeline(remainder=remainder, epochs=2)
    assert data.steps_per_epoch == steps
    batches = list(data)
    assert len(batches) == 2 * steps
    for epoch in (batches[:steps], batches[steps:]):
        tokens, used = tokens_of(epoch), np.concatenate([batch["positions"][:, 0] for batch in epoch]) == 0
        assert used.sum() == rows
        assert used[:rows].all()
        assert len({tuple(row) for row in tokens[used]}) == rows
    blank = {name: array[-1] for name, array in batches[-1].items()}
    if remainder == "pad":
        assert (blank["positions"] == -1).all()
        assert not blank["weights"].any()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_from_a_position_the_next_batches_are_the_same_bit_for_bit(tmp_path, name, prefetch):
    options = {**setting(name, tmp_path), "prefetch": prefetch}
    whole = start(**options)
    states, batches = [json.loads(json.dumps(whole.get_state()))], []
    for _ in range(9):  # an epoch has 3 or 4 steps
        batches.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    for done in (0, 1, 2, 3, 4, 5, 7):
        fresh = start(**options)
        if done % 2:
            next(fresh)  # a position holds wherever the iterator was before
        fresh.set_state(states[done])
        assert fresh.get_state() == states[done]
        assert_equal_batches(take(fresh, 2), batches[done : done + 2])
        assert fresh.get_state() == states[done + 2]


@pytest.mark.parametrize("processes", [2, 3, 4, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_batches_of_all_processes_make_up_that_of_one(tmp_path, name, processes):
    options = setting(name, tmp_path)
    one = start(**options)
    expected = take(one, 9)
    parts = []

    def gather(_):
        return [part._parent.get_state() for part in parts]

    parts += [start(index, processes, gather=gather, **options) for index in range(processes)]

    def together(count):
        steps = zip(*[take(part, count) for part in parts], strict=True)
        return [{name: np.concatenate([share[name] for share in step]) for name in step[0]} for step in steps]

    assert_equal_batches(together(5), expected[:5])
    states = [part.get_state() for part in parts]
    assert all(state == states[0] for state in states)
    again = start(**options)  # one process continues where several stopped
    again.set_state(json.loads(json.dumps(states[0])))
    assert_equal_batches(take(again, 4), expected[5:])
    back = start(**options)
    take(back, 5)
    for part in parts:  # and the other way round
        part.set_state(back.get_state())
    assert_equal_batches(together(4), expected[5:])


def test_each_process_reads_its_share_of_a_streams_files(tmp_path):
    options = streamed(tmp_path, batch_size=8)
    files = set()
    for index in range(4):
        tokens = tokens_of(take(start(index, 4, **options), 12)).ravel()
        seen = set(TOKENIZER.decode(tokens, skip_special_tokens=True).replace("[", " ").split())
        mine = {word.split(".")[0] for word in seen if "." in word and len(word.split(".")[0]) == 1}
        assert len(mine) == 1
        files |= mine
    assert files == {"0", "1", "2", "3"}


def test_a_stream_goes_through_all_documents_in_another_order_each_time(tmp_path):
    pattern, texts = write_files(tmp_path)
    every = [text for file in texts for text in file]
    options = {"sources": (SourceConfig(pattern, streaming=True),), "given": {}, "batch_size": 1, "packing": "pack"}
    batches = take(start(**options, window=len(every), sequence_length=60), 40)
    documents = []
    for batch in batches:
        tokens, starts = batch["tokens"][0], batch["starts"][0]
        used = batch["positions"][0] >= 0
        documents += [TOKENIZER.decode(tokens[used & (starts == s)][:-1]) for s in np.unique(starts[used])]
    first, second = documents[: len(every)], documents[len(every) : 2 * len(every)]
    assert sorted(first) == sorted(every) == sorted(second)
    assert first != second
    assert first != every


def test_a_mixture_has_rows_in_proportion_and_all_of_each_source():
    rows = [TOKENIZER.decode(row) for row in tokens_of(take(start(**MIXTURE), 20))]
    numbers = [row for row in rows if row.startswith("<row")]
    assert len(numbers) == 180
    assert set(numbers) == {f"<row {row:03d}>\n" for row in range(41)}
    with pytest.raises(UsageError, match="epochs need one source"):
        DataConfig(sources=("pydoc", "pydoc"), epochs=1)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("prompts", ["plain", "chat"])
def test_prompts_are_read_and_not_predicted(mask, prompts):
    questions = [Document("yes", "really?"), Document("no!", "sure?"), Document("perhaps", "")]
    options = {"packing": "pack", "shuffle": False, "batch_size": 1, "sequence_length": 40, "epochs": 1}
    given = {"questions": questions}
    (batch,) = pipeline(
        sources=("questions",), given=given, mask_prompts=mask, prompts=prompts, separator=" = ", **options
    )
    text, predicted = "", ""
    for token, weight in zip(batch["tokens"][0], batch["weights"][0], strict=True):
        piece = TOKENIZER.decode([token])
        text += piece
        predicted += piece if weight else "-" * len(piece)
    before = {"plain": "{} = ", "chat": "<user>{}<assistant>"}[prompts]
    wanted, masked = "", ""
    for document in questions:
        prompt = before.format(document.prompt) if document.prompt else ""
        wanted += prompt + document.text + "<eos>"
        if mask:
            masked += "-" * len(prompt) + document.text[0 if prompt else 1 :].rjust(len(document.text), "-") + "<eos>"
        else:
            whole = prompt + document.text + "<eos>"
            first = len("<user>") if whole.startswith("<user>") else 1
            masked += "-" * first + whole[first:]
    pad = len(text) - len(wanted)
    assert text[: len(wanted)] == wanted
    assert predicted == masked + "-" * pad


def test_documents_are_joined_by_the_end_of_text_token_and_can_begin_with_another():
    given = {"two": [Document("abc"), Document(""), Document("de")], "tokens": [TokenDocument(np.arange(5), 3)]}
    options = {"given": given, "shuffle": False, "batch_size": 1, "epochs": 1, "sequence_length": 8}
    (batch,) = pipeline(sources=("two",), **options)
    assert batch["tokens"][0].tolist() == [*TOKENIZER.encode("abc"), EOS, *TOKENIZER.encode("de"), EOS, EOS]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    (batch,) = pipeline(sources=("two",), end_token=False, **options)
    assert batch["starts"][0].tolist()[:5] == [0, 0, 0, 3, 3]
    (batch,) = pipeline(sources=("tokens",), **options)
    assert batch["tokens"][0].tolist()[:5] == [0, 1, 2, 3, 4]
    assert batch["weights"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    with pytest.raises(UsageError, match="set begin_token to false"):
        pipeline(sources=("two",), begin_token=True, **options)


def test_the_report_counts_what_is_left_out():
    documents = [Document("a" * size) for size in (3, 9, 10, 30, 0)]
    options = {"sources": ("d",), "given": {"d": documents}, "packing": "pack", "batch_size": 1}
    (report,) = pipeline(**options).reports
    assert (report.documents, report.tokens) == (4, 3 + 9 + 10 + 30 + 4)
    assert (report.rows, report.dropped_documents, report.dropped_tokens) == (4, 0, 1 + 21)
    (report,) = pipeline(**options, long_documents="drop").reports
    assert (report.rows, report.dropped_documents, report.dropped_tokens) == (2, 2, 11 + 31)


def test_a_position_in_other_data_is_refused():
    state = start().get_state()
    with pytest.raises(UsageError, match="seed differ"):
        start(seed=1).set_state(state)
    with pytest.raises(UsageError, match="sources differ"):
        start(given=numbered(40)).set_state(state)
    with pytest.raises(UsageError, match="packing, sources differ"):
        start(packing="pack", sequence_length=500, batch_size=1).set_state(
            start(sequence_length=500, batch_size=1).get_state()
        )
    with pytest.raises(UsageError, match="sources differ"):
        start(given=numbered(41), sources=(SourceConfig("numbers", weight=2.0),)).set_state(state)
    start(prefetch=0, epochs=5).set_state(state)
    with pytest.raises(UsageError, match="position is in other data"):
        start().set_state({"batches": 3})


def test_a_position_of_one_process_alone_is_refused_with_streams(tmp_path):
    options = streamed(tmp_path, batch_size=8)
    one = start(0, 4, **options, gather=lambda position: [position])
    other = start(1, 4, **options, gather=lambda position: [position])
    with pytest.raises(UsageError, match="lacks part 1"):
        other.set_state(one.get_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "at least one source"),
        ({"sources": "pydoc"}, "expected a list"),
        ({"sources": ({"name": "pydoc", "colour": 1},)}, "options name, colour; expected name, and any of arguments"),
        ({"sources": ({"name": "pydoc", "weight": -1.0},)}, "weight of pydoc is -1"),
        ({"sources": 5}, "sources is 5; expected a list"),
        ({"sources": (5,)}, "sources is "),
        ({"sources": ({"name": "pydoc", 3: 1},)}, "sources is .*; expected a list"),
        ({"separator": 7}, "separator is 7; expected a text"),
        ({"window": "x"}, "window is 'x'; expected a whole number"),
        ({"shuffle": None}, "shuffle is None; expected true or false"),
        ({"packing": ["pack"]}, "packing is "),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"window": 0}, "window is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"packing": "best"}, "packing is 'best'; expected concatenate or pack"),
        ({"long_documents": "split"}, "expected cut or drop"),
        ({"prompts": "raw"}, "expected plain or chat"),
        ({"remainder": "keep"}, "expected drop or pad"),
        ({"sources": (SourceConfig("a.jsonl", streaming=True),), "epochs": 1}, "epochs need one source"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": numbered(11)}, "makes 11 rows of 10 tokens, but a batch needs 12"),
        ({"given": {"numbers": [Document("")]}}, "nothing to train on: 0 documents"),
        ({"sources": (SourceConfig("numbers", skip_tokens=999),)}, "0 are left after skip_tokens"),
        ({"packing": "pack", "given": {"numbers": [Document("a", "too long a prompt")]}}, "none fits a row"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"process_count": 5}, "divides batch_size"),
        ({"sources": ("no-such-file.txt",)}, "no text file"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        pipeline(**options)


def test_streams_without_rows_or_text_are_refused_when_read(tmp_path):
    for name, rows in {"blank": [""] * 9, "long": ["x"] * 3}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    blank = SourceConfig(str(tmp_path / "blank.jsonl"), streaming=True)
    with pytest.raises(UsageError, match="without anything to predict"):
        next(start(sources=(blank,), given={}, window=4))
