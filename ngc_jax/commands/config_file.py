"""The YAML file of --config: plain data, checked before a command uses it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ngc_jax.errors import UsageError

# The repository's configs/, which an installed package includes.
SHIPPED = Path(__file__).parents[1] / "configs"


class _Loader(yaml.SafeLoader):
    """Data only: no Python tags, no duplicate keys, no aliases (a few of which can expand to gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "an option's name must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a string, since it requires a point and a sign. The number is meant.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config_file(path: str, names: Sequence[str]) -> dict[str, Any]:
    """The options that a YAML file gives; null means not given.

    Args:
        path: The file, or the name of one that is part of the package, such as compare_quick.
        names: Of the available options.

    Raises:
        UsageError: If it cannot be read, is not a mapping, or has another option.
    """
    file = _find(path)
    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except FileNotFoundError:
        names = ", ".join(sorted(shipped.stem for shipped in SHIPPED.glob("*.yaml")))
        raise UsageError(
            f"--config {path}: there is no such file, nor a shipped config of that name ({names})"
        ) from None
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 text (byte {error.start}); write it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {_reason(error)}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an invalid date
        raise UsageError(f"--config {path} is not valid YAML: {_short(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UsageError(f"--config {path} has no options; expected lines such as 'keep: 0.8'")
    given = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise UsageError(f"--config {path} has the option {name!r}, which the command does not have; {hint}")
    return given


def _find(path: str) -> Path:
    """The file or, if there is none, the one of that name in the package; - is standard input."""
    file = Path("/dev/stdin" if path == "-" else path).expanduser()
    shipped = SHIPPED / Path(path).name
    shipped = shipped if shipped.suffix == ".yaml" else shipped.with_name(f"{shipped.name}.yaml")
    return shipped if not file.exists() and Path(path).parent.name in ("", "configs") and shipped.is_file() else file


def typed_values(parser: ArgumentParser, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in their options' types.

    Raises:
        UsageError: If one does not fit its option.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        try:
            found[name] = parser.parse_object({name: value}, defaults=False)[name]
        except (ArgumentError, RecursionError) as error:
            wanted = _short(error).replace("Parser key ", "option ").replace("<class ", "").replace(">", "")
            raise UsageError(f"--config {path}: {name} is {_short(repr_of(value), 60)}: {wanted}") from None
    return found


def repr_of(value: Any) -> str:
    """A value as text, even if it is nested too deeply to be shown."""
    try:
        return repr(value)
    except RecursionError:
        return "nested too deeply"


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{_short(getattr(error, 'problem', None) or error)}{where}"


def _short(message: Any, most: int = 200) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
