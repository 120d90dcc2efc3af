"""The command line, end to end on a tiny model: no network, no real weights."""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from ngc_jax import cli
from ngc_jax.commands.help_format import EXAMPLES
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.models.compact import dense_model
from tests.tiny import forward, random_tokens

SHORT = ("--calibration-tokens", "96", "--window", "32", "--batch-size", "2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(dense_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("Groups of neurons exchange signals; a weight is what two states make of each other.\n" * 8)
    return str(file)


@pytest.fixture(scope="module")
def compact(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "compact"
    summary = out.parent / "summary.json"
    arguments = ["--method", "ngc", "--topology", "qkv-o-ug-d", "--keep", "0.6", "--text", text, *SHORT]
    assert cli.main(["convert", dense, *arguments, "--out", str(out), "--json", str(summary)]) == 0
    return str(out), json.loads(summary.read_text())


def test_convert_writes_a_model_and_counts_what_it_stored(compact, dense):
    out, summary = compact
    model = load_model(out)
    assert summary["command"] == "convert"
    assert summary["stored_parameters"] == model.plan.count_parameters()
    assert summary["dense_parameters"] == sum(block.parameters for block in load_model(dense).config.blocks())
    assert summary["keep_ratio"] == pytest.approx(summary["stored_parameters"] / summary["dense_parameters"])
    assert summary["keep_ratio"] <= 0.6
    assert summary["total_parameters"] == model.count_parameters()
    assert summary["total_dense_parameters"] == load_model(dense).count_parameters()
    assert 2**27 < summary["peak_bytes"] < 2**36
    assert model.conversion["topology"] == "qkv-o-ug-d"
    assert f"{summary['stored_parameters']:,}" in Path(out, "README.md").read_text()


def test_a_saved_compact_model_gives_the_same_bits_in_a_new_process(compact):
    out, _ = compact
    tokens = random_tokens(20)
    program = (
        "import sys, numpy as np, jax\n"
        "from ngc_jax.models.load import load_model\n"
        "model = load_model(sys.argv[1])\n"
        "tokens = np.array(eval(sys.argv[2]), np.int32)[None]\n"
        "logits = jax.jit(lambda p, t: model.decoder.apply({'params': p}, t)[0])(model.params, tokens)\n"
        "sys.stdout.buffer.write(np.asarray(logits).tobytes())\n"
    )
    model = load_model(out)
    expected = np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])
    run = subprocess.run([sys.executable, "-c", program, out, str(tokens.tolist())], capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(run.stdout, np.float32).reshape(expected.shape), expected)


def test_info_agrees_with_convert(compact, tmp_path, capsys):
    out, converted = compact
    assert cli.main(["info", out, "--all-groups", "--json", str(tmp_path / "info.json")]) == 0
    summary = json.loads((tmp_path / "info.json").read_text())
    for name in ("keep_ratio", "stored_parameters", "dense_parameters", "total_parameters", "bytes", "groups"):
        assert summary[name] == converted[name]
    printed = capsys.readouterr().out
    assert "L0-qkv" in printed
    cache = summary["cache_numbers_per_token"]
    assert cache["latent"] < cache["full"]
    sizes = f"{2 * cache['full']:,} bytes per token, {2 * cache['latent']:,} bytes with --cache latent"
    assert sizes in " ".join(printed.split())
    assert f"{summary['stored_parameters']:,}" in printed


def test_info_of_a_dense_model(dense, tmp_path, capsys):
    assert cli.main(["info", dense, "--json", str(tmp_path / "info.json")]) == 0
    summary = json.loads((tmp_path / "info.json").read_text())
    assert summary["keep_ratio"] == 1.0
    assert summary["total_parameters"] == load_model(dense).count_parameters()
    assert "dense" in capsys.readouterr().out


def test_evaluate_reports_and_flags_override_yaml(compact, text, tmp_path):
    out, _ = compact
    config, result = tmp_path / "evaluate.yaml", tmp_path / "evaluate.json"
    config.write_text(yaml.safe_dump({"model": "nowhere/else", "text": text, "window": 16, "max_tokens": 64}))
    flags = [
        "evaluate",
        out,
        "--max-tokens",
        "40",
        "--config",
        str(config),
        "--skip-tokens",
        "8",
        "--json",
        str(result),
    ]
    assert cli.main(flags) == 0
    summary = json.loads(result.read_text())
    assert summary["tokens"] == 40 - 3  # windows of 16, 16 and 8
    assert summary["perplexity"] > 1
    assert summary["bits_per_byte"] > 0
    assert summary["tokens_per_second"] > 0
    assert summary["parameters"] == load_model(out).count_parameters()


def test_generate_prints_what_it_returns(compact, tmp_path, capsys):
    out, _ = compact
    result = tmp_path / "generate.json"
    options = ["--max-new-tokens", "9", "--json", str(result)]
    assert cli.main(["generate", out, "--prompt", "Groups of", *options]) == 0
    (single,) = json.loads(result.read_text())["texts"]
    assert single.strip() in capsys.readouterr().out
    assert cli.main(["generate", out, "--prompt", "Groups of", "neurons", *options]) == 0
    assert json.loads(result.read_text())["texts"][0] == single


def test_generate_says_how_large_its_cache_is(compact, tmp_path):
    """Of numbers of four bytes; all kinds give the same text."""
    out, converted = compact
    result, texts = tmp_path / "generate.json", set()
    for kind, numbers in converted["cache_numbers_per_token"].items():
        options = ["--max-new-tokens", "9", "--cache", kind, "--json", str(result)]
        assert cli.main(["generate", out, "--prompt", "Groups of", *options]) == 0
        summary = json.loads(result.read_text())
        assert summary["cache"] == kind
        assert summary["cache_bytes_per_token"] == 4 * numbers
        texts.add(summary["texts"][0])
    assert len(texts) == 1


def test_generate_with_a_drafter_gives_the_same_text(compact, dense, tmp_path):
    out, _ = compact
    result, texts = tmp_path / "generate.json", []
    for options in ([], ["--draft", out, "--draft-tokens", "2"]):
        common = ["--prompt", "Groups of", "--max-new-tokens", "9", "--json", str(result)]
        assert cli.main(["generate", dense, *common, *options]) == 0
        summary = json.loads(result.read_text())
        texts += summary["texts"]
    assert texts[0] == texts[1]
    assert (summary["draft"], summary["draft_tokens"]) == (out, 2)


def test_chat_puts_the_prompt_into_the_template(compact, tmp_path):
    out, _ = compact
    result = tmp_path / "generate.json"
    options = ["--temperature", "3", "--seed", "5", "--max-new-tokens", "9", "--json", str(result)]
    texts = []
    for prompt in (["--prompt", "Hi", "--chat"], ["--prompt", "<user>Hi<assistant>"], ["--prompt", "Hi"]):
        assert cli.main(["generate", out, *prompt, *options]) == 0
        texts += json.loads(result.read_text())["texts"]
    assert texts[0] == texts[1] != texts[2]


def test_text_that_the_model_samples_itself(dense, tmp_path):
    out, result = tmp_path / "out", tmp_path / "convert.json"
    flags = ["convert", dense, "--text", "sampled", *SHORT, "--out", str(out), "--json", str(result)]
    assert cli.main(flags) == 0
    assert json.loads(result.read_text())["calibration"] == {
        "text": "sampled",
        "tokens": 96,
        "window": 32,
        "bos": "auto",
        "prefix": [],
    }


@pytest.mark.parametrize("devices", ["1", "2"])
def test_full_rank_option(dense, text, tmp_path, devices):
    out = tmp_path / "full"
    flags = ["--rank", "full", "--text", text, *SHORT, "--devices", devices]
    assert cli.main(["convert", dense, *flags, "--out", str(out)]) == 0
    tokens = random_tokens(20)
    before, after = (
        np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])
        for model in (load_model(dense), load_model(str(out)))
    )
    assert np.abs(after - before).max() / np.abs(before).max() < 1e-3


BAD_INPUT = {
    "no such model": (["convert", "no/such/dir/model"], "no/such/dir/model"),
    "keep 0": (["convert", "{dense}", "--keep", "0"], "outside (0, 1]"),
    "keep 1.5": (["convert", "{dense}", "--keep", "1.5"], "outside (0, 1]"),
    "no devices": (["convert", "{dense}", "--devices", "0"], "expected at least 1"),
    "too many devices": (["convert", "{dense}", "--devices", "9"], "this machine has 8"),
    "keep word": (["convert", "{dense}", "--keep", "most"], "keep"),
    "tiny keep": (["convert", "{dense}", "--keep", "0.001"], "raise it to at least"),
    "topology syntax": (["convert", "{dense}", "--topology", "qk--v"], "^"),
    "topology role": (["convert", "{dense}", "--topology", "qxk"], "x"),
    "unknown method": (["convert", "{dense}", "--method", "magic"], "magic"),
    "missing text": (["convert", "{dense}", "--text", "no-such-file.txt"], "no-such-file.txt"),
    "empty text": (["convert", "{dense}", "--text", "{empty}"], "empty"),
    "short text": (["convert", "{dense}", "--text", "{text}", "--calibration-tokens", "99999"], "too short"),
    "not UTF-8": (["convert", "{dense}", "--text", "{binary}"], "UTF-8"),
    "no out": (["convert", "{dense}", "--out="], "--out"),
    "compact again": (["convert", "{compact}", "--text", "{text}"], "compact model already"),
    "skips all": (["evaluate", "{dense}", "--text", "{text}", "--skip-tokens", "99999"], "too short"),
    "window 1": (["evaluate", "{dense}", "--text", "{text}", "--window", "1"], "window 1"),
    "no prompt": (["generate", "{dense}"], "--prompt"),
    "system without chat": (["generate", "{dense}", "--prompt", "a", "--system", "b"], "--chat"),
    "unknown option": (["info", "{dense}", "--colour"], "--colour"),
    "unknown command": (["shrink"], "shrink"),
    "bad json directory": (["info", "{dense}", "--json", "no-such-dir/x.json"], "no-such-dir"),
    "missing config": (["info", "--config", "no-such.yaml"], "no-such.yaml"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_line(case, dense, compact, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00abc")
    places = {"dense": dense, "compact": compact[0], "text": text}
    places |= {"empty": str(tmp_path / "empty.txt"), "binary": str(tmp_path / "binary.txt")}
    flags, expected = BAD_INPUT[case]
    flags = [flag.format(**places) for flag in flags]
    out = tmp_path / "out"
    if flags[0] == "convert" and "--out=" not in flags:
        flags += ["--out", str(out)]
    assert cli.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("ngc-jax: error: ")
    assert expected in error
    # A topology's error shows the text and points at the character, on two lines more.
    assert len(error.strip().splitlines()) == (3 if case.startswith("topology") else 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.txt", "empty.txt"]


def test_an_output_directory_is_not_overwritten_unless_asked(compact, dense, text, tmp_path, capsys):
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    flags = ["convert", dense, "--text", text, *SHORT, "--out", str(out)]
    assert cli.main(flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*flags, "--overwrite"]) == 2  # not a model: never
    assert (out / "precious.txt").read_text() == "mine"
    out = save_model(dense_model("llama", num_hidden_layers=1), tmp_path / "old")
    assert cli.main([*flags[:-1], str(out), "--overwrite"]) == 0
    assert load_model(str(out)).plan is not None


def test_interrupting_leaves_nothing_behind(dense, text, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ngc_jax.conversion.fitted.fit_all", interrupt)
    assert cli.main(["convert", dense, "--text", text, *SHORT, "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help_answers_at_once_and_describes_every_option(command):
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ngc_jax.cli", *command, "--help"], capture_output=True, text=True
    )
    assert time.perf_counter() - start < 20  # generous: what is slow is importing these
    assert run.returncode == 0
    for heavy in ("jax", "transformers", "scipy", "datasets"):
        assert f"| {heavy}\n" not in run.stderr.replace("  ", "")
    if command:
        for field in dataclasses.fields(cli.COMMANDS[command[0]]):
            assert field.name in ("model", "sources") or f"--{field.name.replace('_', '-')}" in run.stdout


def test_help_has_examples_that_are_commands():
    assert set(EXAMPLES) == set(cli.COMMANDS)
    for command, lines in EXAMPLES.items():
        assert len(lines) >= 2
        for line in lines:
            program, *arguments = shlex.split(line)
            assert (program, cli.parse_arguments(arguments)[0]) == ("ngc-jax", command)


def test_help_has_groups_and_types_in_words(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    for heading in ("conversion:", "text:", "machine:", "output:", "examples:"):
        assert f"\n{heading}\n" in shown
    for code in ("Literal", "Optional", "Union", "null, ", "None", "type: "):
        assert code not in shown.replace("{true,false,null}", "")


def test_every_file_in_configs_is_valid():
    for file in Path("configs").glob("*.yaml"):
        command = file.read_text().split("ngc-jax ", 1)[1].split()[0]
        name, config = cli.parse_arguments([command, "--config", str(file)])
        assert name == command
        for key, value in yaml.safe_load(file.read_text()).items():
            assert getattr(config, key) == value


def test_convert_at_its_defaults_takes_what_the_text_has(dense, text, tmp_path, capsys):
    out, result = tmp_path / "out", tmp_path / "convert.json"
    length = len(load_model(dense).load_tokenizer().encode(Path(text).read_text()))
    flags = ["convert", dense, "--text", text, "--method", "svd_llm", "--keep", "0.6"]
    assert cli.main([*flags, "--out", str(out), "--json", str(result)]) == 0
    assert json.loads(result.read_text())["calibration"]["tokens"] == length < 65_536
    assert f"calibrating on {length:,} tokens" in capsys.readouterr().out


def test_a_method_that_looks_at_no_text_needs_none(dense, tmp_path):
    out, result = tmp_path / "out", tmp_path / "convert.json"
    flags = ["convert", dense, "--method", "svd", "--keep", "0.6", "--text", "no-such-file.txt"]
    assert cli.main([*flags, "--out", str(out), "--json", str(result)]) == 0
    assert json.loads(result.read_text())["calibration"] is None
    assert "calibration" not in (out / "README.md").read_text()
