"""The command line: typed configs in, one call, one summary out."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import typing
from argparse import Action
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

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
    report,
    stability,
    train,
)
from ngc_jax.errors import UsageError
from ngc_jax.files import write_json

COMMANDS = {
    "convert": convert.ConvertConfig,
    "evaluate": evaluate.EvaluateConfig,
    "generate": generate.GenerateConfig,
    "info": info.InfoConfig,
    "export": export.ExportConfig,
    "distil": distil.DistilConfig,
    "train": train.TrainConfig,
    "plan-memory": plan_memory.PlanMemoryConfig,
    "stability": stability.StabilityConfig,
    "report": report.ReportConfig,
    "demo": demo.DemoConfig,
    "compare": compare.CompareConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _tell_of_downloads()
    try:
        command, config = parse_arguments(arguments)
        if config.json is not None and not Path(config.json).absolute().parent.is_dir():
            raise UsageError(f"--json {config.json} is in a directory that does not exist; make it first")
        summary = config.run()
        if config.json is not None:
            write_json(Path(config.json), {"command": command, **summary})
    except UsageError as error:
        print(f"ngc-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ngc-jax: interrupted; nothing half written was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _tell_of_downloads() -> None:
    """Show what the library logs (such as that it fetches a model) on stderr."""
    logger = logging.getLogger("ngc_jax")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, Any]:
    """The command and its config, from flags and from the YAML file of --config, which flags override.

    Raises:
        UsageError: If the arguments do not fit.
        SystemExit: After --help and --version.
    """
    arguments = _config_first(arguments)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        parsed = _parser().parse_args(arguments)
    except ArgumentError as error:
        reason = " ".join(str(error).split()).replace("Parser key ", "option ")
        raise UsageError(f"{reason}; see ngc-jax {chosen} --help".replace("  ", " ")) from error
    values: Namespace = parsed[parsed.command]
    fields = {field.name for field in dataclasses.fields(COMMANDS[parsed.command])}
    return parsed.command, COMMANDS[parsed.command](**{name: values[name] for name in fields})


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Put --config before every other option, because later ones win."""
    arguments, configs, index = list(arguments), [], 1
    while index < len(arguments):
        if arguments[index] == "--config" and index + 1 < len(arguments):
            configs += [arguments.pop(index), arguments.pop(index)]
        elif arguments[index].startswith("--config="):
            configs.append(arguments.pop(index))
        else:
            index += 1
    return arguments[:1] + configs + arguments[1:]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="ngc-jax",
        description="See, shrink and study large language models as societies of neuronal groups.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, config in COMMANDS.items():
        commands.add_subcommand(name, _command_parser(config), help=_summary(config))
    return parser


def _command_parser(config: type) -> ArgumentParser:
    """Options from a config's fields, their help from its docstring. Fields `model` and `sources` are positional."""
    docstring = parse_docstring(config.__doc__ or "")
    helps = {
        parameter.arg_name: parameter.description
        for base in reversed(config.__mro__)
        for parameter in parse_docstring(base.__doc__ or "").params
    }
    parser = ArgumentParser(description=docstring.description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file that fills the options below; flags override it"
    )
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = None if field.default is dataclasses.MISSING else field.default
        common: dict[str, Any] = {"help": helps[field.name], "default": default}
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "model":
            parser.add_argument("model", nargs="?", **common)
        elif field.name == "sources":
            parser.add_argument("sources", nargs="*", type=str, action=_KeepUnlessGiven, **common)
        elif types[field.name] is bool:
            parser.add_argument(flag, action="store_true", **common)
        elif types[field.name] in (list[str] | None, list[float] | None):
            parser.add_argument(flag, nargs="+", type=str if types[field.name] == list[str] | None else float, **common)
        else:
            parser.add_argument(flag, type=types[field.name], **common)
    return parser


class _KeepUnlessGiven(Action):
    """Stores a positional list; an empty one does not override that of a --config file."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values:
            setattr(namespace, self.dest, values)


def _summary(config: type) -> str:
    return parse_docstring(config.__doc__ or "").short_description or ""


if __name__ == "__main__":
    sys.exit(main())
