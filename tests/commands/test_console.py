"""What commands print: texts that look like markup, control characters, paths that are no text."""

import os

import pytest

from ngc_jax import cli
from ngc_jax.commands.console import console, progress_bar, table
from ngc_jax.models.save import save_model
from tests.tiny import tiny_model

MARKUP = ["[/INST]", "[bold]x[/bold]", ":smile:", "[link=http://x]y[/link]", "[red]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_model(tiny_model(), tmp_path_factory.mktemp("edge") / "dense"))


@pytest.mark.parametrize("text", MARKUP)
def test_texts_are_printed_as_they_are(text, capsys):
    console.print(text)
    console.print(table(f"title {text}", ["a", text], [[text, "1"]]))
    with progress_bar(text) as bar:
        bar(1, 1)
    captured = capsys.readouterr()
    assert captured.out.count(text) == 4
    assert captured.err == f"{text}: 1 of 1 done\n"


@pytest.mark.parametrize("text", ["a\tb  ", "\x1b[31mred", "bell\x07 back\x08 return\r", "x " * 99])
def test_a_pipe_gets_every_character_and_a_terminal_no_control_characters(text, monkeypatch, capsys):
    console.print(text, text, end="|")
    assert capsys.readouterr().out == f"{text} {text}|"
    monkeypatch.setattr(type(console), "is_terminal", True)
    console.print(text)
    console.print(text, style="bold")
    console.print(table(text, [text], [[text]]))
    shown = capsys.readouterr().out
    assert not set(shown.replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")) & set("\x1b\x07\x08\r")
    assert ("\\x1b[31mred" in shown) == ("red" in text)


def test_a_streamed_text_is_printed_through_the_console(dense, monkeypatch, capsys):
    monkeypatch.setattr("ngc_jax.models.generate.stream_text", lambda *_, **__: iter(["[/INST]", "\x1b[2J\n", "\t."]))
    assert cli.main(["generate", dense, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "[/INST]\x1b[2J\n\t.\n"
    monkeypatch.setattr(type(console), "is_terminal", True)
    assert cli.main(["generate", dense, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "[/INST]\\x1b[2J\n\t.\n"


def test_prompts_that_look_like_markup(dense, capsys):
    options = ["--max-new-tokens", "2", "--prompt", "a [/INST]", "[bold]b :smile:"]
    assert cli.main(["generate", dense, *options]) == 0
    out = capsys.readouterr().out
    assert "a [/INST]\n" in out
    assert "[bold]b :smile:\n" in out


def test_a_path_that_is_no_text_is_printed(tmp_path, capfd):
    assert cli.main(["info", os.fsdecode(os.fsencode(tmp_path) + b"/\xff")]) == 2
    assert "no such model" in capfd.readouterr().err
