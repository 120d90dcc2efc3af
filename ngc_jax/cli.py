"""The command line: typed configs in, one library call, one summary out."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import sys
import threading
import typing
from argparse import Action
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ngc_jax import __version__
from ngc_jax.commands import (
    compare,
    convert,
    demo,
    distil,
    evaluate,
    export,
    generate,
    info,
    plan_memory,
    push,
    report,
    stability,
    train,
)
from ngc_jax.commands.config_file import read_config_file, typed_values
from ngc_jax.commands.escapes import escape_controls
from ngc_jax.commands.help_format import PlainHelp, examples_of, group_of, group_order, type_in_words
from ngc_jax.commands.interrupts import Terminated, interruptible
from ngc_jax.errors import UsageError
from ngc_jax.files import check_target, explain, quoted_errno, write_summary
from ngc_jax.groups.topology_text import TopologyError
from ngc_jax.lazy import missing_extra

COMMANDS = {
    "convert": convert.ConvertConfig,
    "evaluate": evaluate.EvaluateConfig,
    "generate": generate.GenerateConfig,
    "info": info.InfoConfig,
    "export": export.ExportConfig,
    "push": push.PushConfig,
    "distil": distil.DistilConfig,
    "train": train.TrainConfig,
    "plan-memory": plan_memory.PlanMemoryConfig,
    "stability": stability.StabilityConfig,
    "report": report.ReportConfig,
    "demo": demo.DemoConfig,
    "compare": compare.CompareConfig,
}


# --print_completion shtab-bash prints the shell code that completes commands and options.
set_parsing_settings(add_print_completion_argument=True)


# Errors that only a bug in ngc-jax raises, whatever failed before.
_DEFECTS = (AssertionError, AttributeError, LookupError, NameError, TypeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 2 for invalid input or a machine problem that the user can fix; 130 when interrupted and 143
        when terminated by a signal.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    _show_log()
    _print_any_text()
    _quiet_late_callbacks()
    try:
        with interruptible():
            _run(arguments)
            sys.stdout.flush()
    except UsageError as error:
        return _refuse(error)
    except Terminated:
        print("ngc-jax: terminated; no partial output was left", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("ngc-jax: interrupted; no partial output was left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has closed it, as `head` does; Python would complain again at exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError) as error:
        advice = explain(error)
        if advice is None:
            raise
        return _refuse(advice)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        return _refuse(f"{arguments[0]} {missing}")
    except _DEFECTS:
        raise
    except Exception as error:
        number = quoted_errno(error)
        advice = None if number is None else explain(OSError(number, os.strerror(number)))
        if advice is not None:
            return _refuse(advice)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:160]
        return _refuse(
            f"the device is out of memory ({reason}); use smaller batches, shorter windows or a smaller dtype"
        )
    return 0


def _run(arguments: Sequence[str]) -> None:
    command, config = parse_arguments(arguments)
    if config.json is None:
        config.run()
        return
    check_target(config.json)
    # If the summary goes to standard output, everything else goes to standard error.
    with redirect_stdout(sys.stderr) if config.json == "-" else nullcontext():
        summary = config.run()
    write_summary(config.json, {"command": command, **summary})


def _refuse(reason: object) -> int:
    text = str(reason)
    if not isinstance(reason, TopologyError):  # which shows the text with a caret below it
        # A name from a damaged file may contain anything, and the terminal obeys control characters.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    print(f"ngc-jax: error: {text}", file=sys.stderr)
    return 2


def _quiet_late_callbacks() -> None:
    """After a failed write tensorstore reports to event loops that are already closed, with a traceback each time."""
    # A failed write in the background is logged and also raised.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unless_late
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _report_background


def _report_background(failed: threading.ExceptHookArgs) -> None:
    """Report in one line what a thread could not write, such as TensorBoard's events on a full disk."""
    advice = explain(failed.exc_value) if isinstance(failed.exc_value, OSError) else None
    if advice is None:
        threading.__excepthook__(failed)
    else:
        logging.getLogger("ngc_jax").warning("in the background: %s", advice)


def _report_unless_late(unraisable: sys.UnraisableHookArgs) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _open_streams() -> None:
    """Standard output and standard error may be closed (`>&-`): output is then discarded."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _print_any_text() -> None:
    """A path or a text may contain characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _ToStderr(logging.StreamHandler):
    """Writes to the current standard error, which a caller may have redirected since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The message, with control characters of file names and file contents escaped."""
        return escape_controls(super().format(record))


def _show_log() -> None:
    """Show the library's log, for example of a download, on stderr."""
    logger = logging.getLogger("ngc_jax")
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.setLevel(logging.INFO)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, Any]:
    """The command and its config, from flags and from the YAML file of --config, which flags override.

    Raises:
        UsageError: If the arguments are invalid.
        SystemExit: After --help and --version.
    """
    rest, files = _take_config_files(arguments)
    chosen = rest[0] if rest and rest[0] in COMMANDS else ""
    given: dict[str, Any] = {}
    texts: list[str] = []
    if chosen and typing.get_type_hints(COMMANDS[chosen]).get("text") == str | list[str]:
        rest, texts = _take_texts(rest)
    if chosen:
        config = COMMANDS[chosen]
        names = [field.name for field in dataclasses.fields(config)]
        for file in files:
            given |= typed_values(_command_parser(config), file, read_config_file(file, names))
    try:
        parsed = _parser(chosen, given).parse_args(rest)
    except ArgumentError as error:
        reason = " ".join(str(error).split()).replace("Parser key ", "option ")
        raise UsageError(f"{reason}; see ngc-jax {chosen} --help".replace("  ", " ")) from error
    values: Namespace = parsed[parsed.command]
    fields = dataclasses.fields(COMMANDS[parsed.command])
    if texts:
        values["text"] = [values["text"], *texts]
    named = {field.name: _expanded(field.name, values[field.name]) for field in fields}
    return parsed.command, COMMANDS[parsed.command](**named)


_POSITIONAL = ("model", "sources")
# Options that hold paths: ~ in them is the home directory, wherever the value comes from.
_PATHS = {"model", "sources", "teacher", "tokenizer", "dense", "out", "text", "evaluation_text", "prompts", "profile"}
_PATHS |= {"against", "data", "json", "task", "images"}
# Of these, the options that name a text: - is standard input.
_TEXTS = {"text", "evaluation_text", "prompts"}


def _expanded(name: str, value: Any) -> Any:
    if name in _PATHS and isinstance(value, str) and "\0" in value:
        raise UsageError(f"--{name} contains a null character; give a path")
    if name in _TEXTS and value == "-":
        return "/dev/stdin"
    if name in _PATHS and isinstance(value, list):
        return [_expanded(name, one) for one in value]
    return os.path.expanduser(value) if name in _PATHS and isinstance(value, str) else value


def _take_config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --config, and the files that it names."""
    rest: list[str] = []
    files: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument == "--config":
            file = next(given, None)
            if file is None:
                raise UsageError("--config has no file; give the path of a YAML file")
            files.append(file)
        else:
            rest.append(argument)
    return rest, files


# A text of several, with its share of the tokens.
_WITH_SHARE = re.compile(r"[^-].*:[\d.]+(e-?\d+)?", re.DOTALL)


def _take_texts(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without all but the first text of `--text NAME:SHARE NAME:SHARE`, and these texts.

    Not by argparse, for which a model after a single text would be another text.
    """
    rest: list[str] = []
    texts: list[str] = []
    in_texts = False
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        if in_texts and _WITH_SHARE.fullmatch(argument):
            texts.append(argument)
            continue
        first = argument.removeprefix("--text=")
        in_texts = False
        if before == "--text" or first != argument:
            texts.clear()  # the last --text counts
            in_texts = _WITH_SHARE.fullmatch(first) is not None
        rest.append(argument)
    return rest, texts


def _text_or_texts(value: Any) -> Any:
    """The type of a text option that also takes several."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
        return value
    raise ValueError("expected a text, or a list of NAME:SHARE such as book.txt:0.5")


def _parser(chosen: str, given: Mapping[str, Any]) -> ArgumentParser:
    """The whole parser; values from the files are the defaults of the chosen command's options."""
    # No abbreviations, since --config is read separately and --conf would not be.
    parser = ArgumentParser(
        allow_abbrev=False,
        prog="ngc-jax",
        formatter_class=PlainHelp,
        description="See, shrink and study large language models as societies of neuronal groups.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    # The others are needed for the list of commands only, and each takes a few hundredths of a second.
    for name in [chosen] if chosen else COMMANDS:
        commands.add_subcommand(name, _command_parser(COMMANDS[name], given, name), help=_summary(COMMANDS[name]))
    return parser


def _command_parser(config: type, given: Mapping[str, Any] | None = None, name: str = "") -> ArgumentParser:
    """Options from a config's fields, their help from its docstring. Fields `model` and `sources` are positional.

    Args:
        config: A command's dataclass.
        given: Values that replace the fields' defaults.
        name: The command's, for its examples.
    """
    docstring = parse_docstring(config.__doc__ or "")
    helps = {
        parameter.arg_name: parameter.description
        for base in reversed(config.__mro__)
        for parameter in parse_docstring(base.__doc__ or "").params
    }
    parser = ArgumentParser(
        description=docstring.description,
        epilog=examples_of(name),
        formatter_class=PlainHelp,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with values of the options below; flags override it"
    )
    types = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    # Imported here: passes of one's own are registered before options are read.
    from ngc_jax.commands.conversion_options import ConversionOptions

    conversion = frozenset(field.name for field in dataclasses.fields(ConversionOptions))
    conversion = conversion if issubclass(config, ConversionOptions) else frozenset()
    titles = {
        name: field.metadata.get("group") or group_of(name, conversion)
        for name, field in fields.items()
        if name not in _POSITIONAL
    }
    groups = {title: parser.add_argument_group(title) for title in group_order(set(titles.values()))}
    for field in fields.values():
        default = None if field.default is dataclasses.MISSING else field.default
        common: dict[str, Any] = {"help": helps[field.name], "default": (given or {}).get(field.name, default)}
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "model":
            action = parser.add_argument("model", nargs="?", type=str, **common)
        elif field.name == "sources":
            action = parser.add_argument("sources", nargs="*", type=str, action=_KeepUnlessGiven, **common)
        elif types[field.name] is bool:
            action = groups[titles[field.name]].add_argument(flag, action=ActionYesNo(no_prefix="no-"), **common)
        elif types[field.name] == str | None:
            # Plain strings: for an optional type, "# Be brief" and "null" would be parsed as YAML and become None.
            action = groups[titles[field.name]].add_argument(flag, type=str, **common)
        elif types[field.name] == str | list[str]:
            action = groups[titles[field.name]].add_argument(flag, type=_text_or_texts, **common)
        elif types[field.name] in (list[str] | None, list[float] | None):
            kind = str if types[field.name] == list[str] | None else float
            action = groups[titles[field.name]].add_argument(flag, nargs="+", type=kind, **common)
        else:
            action = groups[titles[field.name]].add_argument(flag, type=types[field.name], **common)
        action.plain_type = type_in_words(types[field.name])
    return parser


class _KeepUnlessGiven(Action):
    """Stores a positional list; an empty one does not override the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values:
            setattr(namespace, self.dest, values)


def _summary(config: type) -> str:
    return parse_docstring(config.__doc__ or "").short_description or ""


if __name__ == "__main__":
    sys.exit(main())
