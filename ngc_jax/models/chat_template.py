"""Chat templates: a conversation to text, by the Jinja template that comes with a tokenizer.

Templates are written for transformers, so what they can use here is what they can use there
(https://huggingface.co/docs/transformers/chat_templating_writing): the variables `messages`, `tools`, `documents`,
`add_generation_prompt` and the special tokens by name; the functions `raise_exception` and `strftime_now`; a `tojson`
that escapes nothing; loop controls; and `{% generation %}` blocks, which mark the assistant's words for training. A
template is foreign code: it runs in Jinja's sandbox and sees plain data only.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Names under which programs pass a message's reasoning; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        template: A Jinja template.
        messages: Dicts with "role" and "content", and whatever else the template reads, such as "tool_calls".
        special_tokens: Texts of tokens by name, such as bos_token.
        tools: JSON schemas of functions that the model may call.
        documents: Dicts with "title" and "text".
        add_generation_prompt: Whether the text ends where the assistant's answer begins.
        variables: Further variables of this template, such as `enable_thinking`; they take precedence over tokens.

    Raises:
        TemplateError: Or any other error that the template raises.

    Example:
        >>> render_chat("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        ...             [{"role": "user", "content": "Hi"}], special_tokens={"bos_token": "<s>"})
        '<s>Hi'
    """
    conversation = [_message(message) for message in messages]
    given = {**special_tokens, **_plain(dict(variables or {}))}
    return _compile(template).render(
        messages=conversation,
        tools=None if tools is None else _plain(list(tools)),
        documents=None if documents is None else _plain(list(documents)),
        add_generation_prompt=add_generation_prompt,
        **given,
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    # Programs write None for what a message does not have; most templates only test whether a key is there.
    plain = _plain({name: value for name, value in message.items() if value is not None})
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value made of JSON's types only: methods of other objects could reach outside of the sandbox."""
    for kind in (str, int, float):  # bool is an int, and the only one that is kept as it is
        if isinstance(value, kind):
            return value if type(value) in (str, int, float, bool) else kind(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


class _Generation(Extension):
    """`{% generation %}`: its body is rendered in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` for templates: the class itself has attributes that lead out of the sandbox."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of dict."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace without private attributes, which lead out of the sandbox."""

    def __init__(*args: Any, **items: Any) -> None:  # an item may be called self
        self, *rest = args
        values = dict(*rest, **items)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store the private attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)
