"""--config: every option of every command can be given in the file, and a flag overrides it."""

import dataclasses
import json
import types
import typing

import pytest
import yaml

from ngc_jax import cli
from ngc_jax.errors import UsageError


def two_values(hint, default):
    """Two values of a type that differ from each other and from a default; the second also as words on the line."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        values = [value for value in typing.get_args(hint) if value != default]
        return values[0], values[-1] if len(values) > 1 else default
    return {
        str: ("some/where", "else/where"),
        int: (7, 9),
        float: (0.25, 0.75),
        bool: (not default, bool(default)),
        list[str]: (["a b", "c"], ["d"]),
        list[float]: ([0.5, 0.25], [0.75]),
        tuple[int, ...]: ([1, 2], [3]),
        dict[str, typing.Any]: ({"a": 1}, {"b": 2}),
        dict[str, float]: ({"a": 1.0}, {"b": 2.0}),
        dict[str, dict[str, typing.Any]]: ({"a": {"keep": 1}}, {"b": {}}),
    }[hint]


def on_the_line(name, value, hint):
    if name == "model":
        return [value]
    if name == "sources":
        return value
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list) and not isinstance(value[0], int):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if not isinstance(value, str) else value]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_values_of_a_file_are_used_and_flags_override_them(command, tmp_path):
    """All options of a command at once."""
    config = cli.COMMANDS[command]
    hints = typing.get_type_hints(config)
    values = {field.name: two_values(hints[field.name], field.default) for field in dataclasses.fields(config)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: first for name, (first, _) in values.items()}))
    # Words before flags: what stands alone would be taken for another value of a flag's list.
    order = sorted(values, key=lambda name: name not in ("model", "sources"))
    flags = [word for name in order for word in on_the_line(name, values[name][1], hints[name])]

    def parsed(*arguments):
        found = cli.parse_arguments([command, *arguments])[1]
        return {name: list(value) if isinstance(value := getattr(found, name), tuple) else value for name in values}

    second = {name: value for name, (_, value) in values.items()}
    assert parsed("--config", str(file)) == {name: first for name, (first, _) in values.items()}
    assert parsed(*flags, f"--config={file}") == second
    assert parsed(*flags) == second


def test_later_files_override_earlier_ones_and_null_is_not_given(tmp_path):
    (tmp_path / "a.yaml").write_text("keep: 0.3\nmodel: first\nrank-multiple: 4\n")
    (tmp_path / "b.yaml").write_text("\ufeffkeep: 1e-1\nmodel: null\n", encoding="utf-8")
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    config = cli.parse_arguments(["convert", *files])[1]
    assert (config.keep, config.model, config.rank_multiple) == (0.1, "first", 4)


BAD_FILES = {
    "keeep: 0.3": "did you mean 'keep'",
    "- a": "has no options",
    "hello": "has no options",
    "keep: many": "keep is 'many'",
    "model: {a: 1}": "model is",
    "keep: 0.3\nkeep: 0.4": "occurs twice",
    'keep: !!python/object/apply:os.system ["true"]': "tag",
    "keep: [1": "not valid YAML",
    "a: &a [*a]": "aliases are not supported",
    "keep: " + "[" * 3000 + "]" * 3000: "not valid YAML",
    "text: 2024-99-99": "not valid YAML",
    "config: other.yaml": "does not have",
    "? [a, b]\n: 1": "must be a word",
    "{a: 1}: 1": "must be a word",
    b"\xff\xfe\x00": "not UTF-8",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(content, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["convert", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert len(error) < 1000
    assert BAD_FILES[content] in error


def test_config_without_a_file(capsys):
    assert cli.main(["info", "--config"]) == 2
    assert "--config has no file" in capsys.readouterr().err


def test_home_is_expanded_wherever_a_path_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "c.yaml").write_text("out: ~/made\ntext: ~/book.txt\n")
    config = cli.parse_arguments(["convert", "~/model", "--config", str(tmp_path / "c.yaml"), "--json=~/x.json"])[1]
    home = "/home/somebody"
    assert (config.model, config.out) == (f"{home}/model", f"{home}/made")
    assert (config.text, config.json) == (f"{home}/book.txt", f"{home}/x.json")
    assert cli.parse_arguments(["generate", "--prompt", "~ is home"])[1].prompt == ["~ is home"]


@pytest.mark.parametrize("option", ["--colour", "--conf=x.yaml", "--js=x"])
def test_an_unknown_option_of_the_line_is_refused(option):
    with pytest.raises(UsageError, match=option):
        cli.parse_arguments(["info", option])


@pytest.mark.parametrize("words", ["# Be brief", "null", "&a", "*a", "[/INST]", "{a: b}", "2024-01-01", "1.0", "a: b"])
def test_words_are_no_yaml(words, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"system": words, "prompt": [words]}))
    for given in (["--system", words, "--prompt", words], ["--config", str(tmp_path / "c.yaml")]):
        config = cli.parse_arguments(["generate", *given])[1]
        assert (config.system, config.prompt) == (words, [words])


@pytest.mark.parametrize("name", ["compare_quick", "compare_quick.yaml", "configs/compare_quick.yaml"])
def test_files_of_the_package_are_found_by_their_names_from_anywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.parse_arguments(["compare", "--config", name])[1].out == "runs/compare_quick"
    (tmp_path / "compare_quick").write_text("out: mine")
    assert cli.parse_arguments(["compare", "--config", "compare_quick"])[1].out == "mine"
    assert cli.main(["compare", "--config", "no_such"]) == 2
    assert "compare_quick" in capsys.readouterr().err
