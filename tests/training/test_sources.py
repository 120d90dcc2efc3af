import json
import re

import datasets
import jax
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models.sample_text import sample_tokens
from ngc_jax.text import read_text
from ngc_jax.training.sources import Document, SourceConfig, Stream, open_source, sampled_source
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_text_is_one_document(tmp_path):
    (tmp_path / "book.md").write_text("# één\ntwo\n", encoding="utf-8")
    (tmp_path / "book.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert list(open_source(SourceConfig(str(tmp_path / "book.md")))) == [Document("# één\ntwo\n")]
    assert list(open_source(SourceConfig(str(tmp_path / "book.txt")))) == [Document("one\ntwo\n")]
    assert list(open_source(SourceConfig("pydoc:first-half"))) == [Document(read_text("pydoc:first-half"))]


def test_several_texts_are_a_document_each_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\nand more\n", encoding="utf-8")
    found = list(open_source(SourceConfig(str(tmp_path / "*.txt"))))
    assert found == [Document("a\nand more\n"), Document("b\nand more\n")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_tables_are_documents(tmp_path, kind):
    rows = {"question": ["2 + 2?", "3 + 4?", None], "reply": ["4", "7", "0"], "text": ["a", "b", "c"]}
    path = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        write_json(path, datasets.Dataset.from_dict(rows))
    else:
        datasets.Dataset.from_dict(rows).to_parquet(path)
    source = open_source(SourceConfig(str(path), column="reply", prompt_column="question"))
    assert list(source) == [Document("4", "2 + 2?"), Document("7", "3 + 4?"), Document("0")]
    assert source[1] == Document("7", "3 + 4?")
    assert source[1:] == list(source)[1:]
    assert list(open_source(SourceConfig(str(path)))) == [Document("a"), Document("b"), Document("c")]
    assert list(open_source(SourceConfig(str(path), joined=True))) == [Document("a\nb\nc")]


def test_lists_and_patterns_of_files_streamed_in_parts(tmp_path):
    files = [write_json(tmp_path / f"{i}.jsonl", [{"text": f"{i}-{j}"} for j in range(3)]) for i in range(4)]
    pattern, chosen = SourceConfig(str(tmp_path / "?.jsonl"), streaming=True), SourceConfig(files[1:3])
    assert [document.text for document in open_source(chosen)] == ["1-0", "1-1", "1-2", "2-0", "2-1", "2-2"]
    stream = open_source(pattern)
    assert isinstance(stream, Stream)
    assert stream.shards == 4
    parts = [[stream.read(row).text for row in stream.open_part(index, 2)] for index in range(2)]
    assert parts == [[f"{i}-{j}" for i in files_of for j in range(3)] for files_of in ((0, 2), (1, 3))]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_of_a_dataset_is_named_like_one_of_the_hub(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "train.jsonl", [{"body": "one"}, {"body": "two"}])
    write_json(tmp_path / "data" / "test.jsonl", [{"body": "three"}])

    def texts(name):
        source = open_source(SourceConfig(name, streaming=streaming))
        rows = source if not streaming else map(source.read, source.open_part(0, 1))
        return [document.text for document in rows]

    assert texts(f"hub:{tmp_path / 'data'}:::body") == ["one", "two"]
    assert texts(f"hub:{tmp_path / 'data'}::test:body") == ["three"]
    with pytest.raises(UsageError, match="has no column 'text'; it has body"):
        texts(f"hub:{tmp_path / 'data'}")


def test_reasoning_gym_answers_its_own_questions_and_is_deterministic():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    config = SourceConfig("reasoning-gym:chain_sum", size=20, seed=3, arguments={"max_terms": 4})
    source = open_source(config)
    assert len(source) == 20
    task = reasoning_gym.create_dataset("chain_sum", seed=3, size=20, max_terms=4)
    for document, entry in zip(source, task, strict=True):
        assert task.score_answer(document.text, entry) == 1
        sums = re.search(r"[-+\d ]+(?= =$)", document.prompt)[0]
        assert sum(map(int, re.findall(r"[-+]?\d+", sums.replace(" ", "")))) == int(document.text)
        assert len(re.findall(r"\d+", sums)) <= 4
    assert list(open_source(config)) == list(source)
    assert list(open_source(SourceConfig("reasoning-gym:chain_sum", size=20, seed=4))) != list(source)
    with pytest.raises(UsageError, match=r"no task 'chain_sums'; it has .* such as chain_sum"):
        open_source(SourceConfig("reasoning-gym:chain_sums"))
    for arguments in ({"terms": 3}, {"min_terms": 9, "max_terms": 3}):
        with pytest.raises(UsageError, match="refuses its arguments"):
            open_source(SourceConfig("reasoning-gym:chain_sum", arguments=arguments))


def test_without_reasoning_gym_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r"pip install 'ngc-jax\[reasoning\]'"):
        open_source(SourceConfig("reasoning-gym:chain_sum"))


def test_sampled_documents_are_the_texts_that_calibration_samples():
    model, key = tiny_model(), jax.random.key(5)
    documents = sampled_source(model, 50, key, length=20)
    assert [len(document.tokens) for document in documents] == [20, 20, 10]
    expected = sample_tokens(model, 50, key, length=20)
    np.testing.assert_array_equal(np.concatenate([document.tokens for document in documents]), expected)
    with pytest.raises(UsageError, match="1 tokens in documents of 20"):
        sampled_source(model, 1, key, length=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "no name"),
        ({"name": "pydoc", "weight": 0.0}, "weight of pydoc is 0.0"),
        ({"name": "pydoc", "weight": float("nan")}, "weight of pydoc is nan"),
        ({"name": "pydoc", "skip_tokens": -1}, "skip_tokens is -1"),
        ({"name": "pydoc", "max_tokens": 0}, "max_tokens 0"),
        ({"name": "a.jsonl", "streaming": True, "max_tokens": 9}, "read whole"),
        ({"name": "a.jsonl", "joined": True, "prompt_column": "q"}, "cannot be joined"),
        ({"name": "pydoc", "arguments": {"x": 1}}, "takes no arguments"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SourceConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no-such-file.txt"}, "no text file no-such-file.txt"),
        ({"name": "no-such-*.jsonl"}, r"no file is called no-such-\*\.jsonl"),
        ({"name": "pydoc:third-half"}, "no text 'pydoc:third-half'"),
        ({"name": "pydoc", "streaming": True}, "not streamed"),
        ({"name": "pydoc", "prompt_column": "q"}, "has no columns"),
        ({"name": "hub:"}, "expected hub:NAME"),
        ({"name": "hub:a:b:c:d:e"}, "expected hub:NAME"),
        ({"name": "hub:org/no-such-dataset"}, "cannot be loaded"),
        ({"name": "hub:org/no-such-dataset", "streaming": True}, "cannot be loaded"),
        ({"name": "{dir}/table.jsonl", "column": "words"}, "no column 'words'; it has text, number"),
        ({"name": "{dir}/table.jsonl", "prompt_column": "q"}, "no column 'q'"),
        ({"name": "{dir}/broken.jsonl"}, "cannot be loaded"),
        ({"name": "{dir}/empty.jsonl"}, "cannot be loaded|has no rows"),
        ({"name": ["{dir}/table.jsonl", "{dir}/a.txt"]}, "expected files of one kind"),
        ({"name": ["{dir}/a.txt", "{dir}/b.md"]}, r"end in \.md, \.txt"),
    ],
)
def test_sources_that_are_not_there_are_refused_in_one_line(tmp_path, options, message):
    write_json(tmp_path / "table.jsonl", [{"text": "a", "number": 1}])
    (tmp_path / "broken.jsonl").write_text("{nonsense\n", encoding="utf-8")
    for name in ("empty.jsonl", "a.txt", "b.md"):
        (tmp_path / name).write_text("", encoding="utf-8")

    def fill(name):
        return name.replace("{dir}", str(tmp_path)) if isinstance(name, str) else [fill(part) for part in name]

    with pytest.raises(UsageError, match=message) as error:
        open_source(SourceConfig(**{**options, "name": fill(options["name"])}))
    assert "\n" not in str(error.value)


def test_a_column_of_numbers_is_refused_when_read(tmp_path):
    source = open_source(SourceConfig(write_json(tmp_path / "t.jsonl", [{"number": 1}]), column="number"))
    with pytest.raises(UsageError, match="holds int, for example '1'"):
        list(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 5}, "name is 5; expected a text or a list"),
        ({"name": ["a.jsonl", None]}, "name is "),
        ({"name": "a.jsonl", "weight": "much"}, "weight is 'much'; expected a number"),
        ({"name": "a.jsonl", "weight": [1, 2]}, "weight is "),
        ({"name": "a.jsonl", "skip_tokens": 1.5}, "skip_tokens is 1.5; expected a whole number"),
        ({"name": "a.jsonl", "max_tokens": "all"}, "max_tokens is 'all'; expected a whole number or nothing"),
        ({"name": "a.jsonl", "column": None}, "column is None; expected a text"),
        ({"name": "a.jsonl", "prompt_column": {}}, "prompt_column is "),
        ({"name": "a.jsonl", "streaming": "no"}, "streaming is 'no'; expected true or false"),
        ({"name": "a.jsonl", "joined": 1}, "joined is 1"),
        ({"name": "a.jsonl", "arguments": ["x" * 500]}, "arguments is .*\\.\\.\\.; expected a mapping"),
    ],
)
def test_options_of_other_types_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SourceConfig(**options)
