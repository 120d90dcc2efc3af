"""A tokenizer as Hugging Face stores it: tokenizer.json, its special tokens and chat template; without transformers.

The library `tokenizers` reads tokenizer.json and does the work. The files beside it are read as by transformers' class
`PreTrainedTokenizerFast` (version 5): added tokens of tokenizer_config.json take precedence over those of
tokenizer.json, special tokens that neither has are added, and the post-processor of tokenizer.json decides whether a
text begins with BOS.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from ngc_jax.files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE, _TEMPLATE_DIRECTORY = "chat_template.jinja", "additional_chat_templates"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings that are written from elsewhere, that tokenizer.json has already, or that name code or paths.
_NOT_SAVED = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
}
_NOT_SAVED |= {"add_bos_token", "add_eos_token", "chat_template", "auto_map", "init_inputs", "tokenizer_class"}
_NOT_SAVED |= {"name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"}

Templates = str | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer and what belongs to it.

    Attributes:
        backend: The tokenizer.
        special_tokens: Text of each special token by its name, such as bos_token; those of a template included.
        extra_special_tokens: Texts of special tokens without a name.
        chat_template: The Jinja template of the chat format, or several by name; None if there is none.
        settings: Other entries of tokenizer_config.json, kept for programs that read them.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    extra_special_tokens: tuple[str, ...] = ()
    chat_template: Templates | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a directory with a tokenizer.json.

        Raises:
            ValueError: If a file is not JSON of the expected form.
            Exception: Of the tokenizers library, whose errors have no common type.
        """
        backend = Backend.from_file(str(directory / TOKENIZER_FILE))
        settings = _read_object(directory / _CONFIG_FILE)
        added = settings.get("added_tokens_decoder")
        if added is None:
            settings.update(_read_object(directory / "special_tokens_map.json"))
        named = _named_tokens(settings, backend)
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        unnamed = [] if isinstance(extra, dict) else [_token(value) for value in extra]
        if added is not None:
            first = [_token(token) for _, token in sorted(added.items(), key=lambda item: int(item[0]))]
        else:
            special = {token.content for token in [*named.values(), *unnamed]}
            older = _read_object(directory / "added_tokens.json")
            known = {token.content for token in backend.get_added_tokens_decoder().values()}
            new = [text for text in sorted(older, key=older.__getitem__) if text not in known]
            first = [AddedToken(text, special=text in special, normalized=text not in special) for text in new]
        _add_tokens(backend, first, named, unnamed)
        backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        return cls(
            backend,
            {name: token.content for name, token in named.items()},
            tuple(token.content for token in unnamed),
            _read_templates(directory, settings),
            {name: value for name, value in settings.items() if name not in _NOT_SAVED and name not in named},
        )

    @classmethod
    def of_transformers(cls, fast: PreTrainedTokenizerFast) -> Self:
        """A tokenizer that transformers has made, sharing its backend."""
        limit = {"model_max_length": fast.model_max_length} if fast.model_max_length < 1e20 else {}
        return cls(
            fast.backend_tokenizer,
            dict(fast.special_tokens_map),
            tuple(getattr(fast, "extra_special_tokens", ())),
            fast.chat_template,
            limit,
        )

    @classmethod
    def of_backend(
        cls,
        backend: Backend,
        special_tokens: Mapping[str, str],
        *,
        chat_template: str | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> Self:
        """A tokenizer without files. Special tokens that the backend does not have are added to it.

        Args:
            backend: The tokenizer; its post-processor is replaced.
            special_tokens: Texts by transformers' names.
            chat_template: Of the chat format.
            add_bos: Whether encoding with special tokens begins with BOS, if there is one.
            add_eos: Whether it ends with EOS, if there is one.
        """
        _add_tokens(backend, (), {name: _token(text) for name, text in special_tokens.items()}, ())
        begin, end = (
            [special_tokens[name]] if given and name in special_tokens else []
            for name, given in (("bos_token", add_bos), ("eos_token", add_eos))
        )
        around = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*begin, *end])]
        backend.post_processor = _framed(begin, end, around)
        return cls(backend, dict(special_tokens), chat_template=chat_template)

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its name; None if the tokenizer has none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def template(self, *, tools: bool) -> str:
        """The chat template; of several, the one for tools if there are tools and it exists.

        Raises:
            ValueError: If there is none, or the files have something else in its place.
        """
        named = self.chat_template if isinstance(self.chat_template, Mapping) else {"default": self.chat_template}
        found = named.get("tool_use" if tools and "tool_use" in named else "default")
        if not isinstance(found, str):
            raise ValueError(f"the template is {found!r:.60} of {', '.join(named)}; expected a text")
        return found

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat templates, for transformers 4 and 5 and `load`."""
        self.backend.save(str(directory / TOKENIZER_FILE))
        named = {name: text for name, text in self.special_tokens.items() if name.endswith("_token")}
        others = {name: text for name, text in self.special_tokens.items() if name not in named}
        extra = self.extra_special_tokens
        config = {
            **self.settings,
            **named,
            # Either is transformers' form: tokens by name, or without names.
            **({"extra_special_tokens": others or list(extra)} if others or extra else {}),
            # A class that transformers 4 knows too, and that uses tokenizer.json unchanged.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / _CONFIG_FILE).write_text(text, encoding="utf-8")
        templates = {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template or {}
        for name, template in templates.items():
            path = directory / (_TEMPLATE_FILE if name == "default" else f"{_TEMPLATE_DIRECTORY}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _token(value: Any) -> AddedToken:
    """A token as the files write it: its text, or an object with its text and how it is matched."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"a special token is {value!r:.60}; expected its text")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: value[flag] for flag in flags if flag in value})


def _named_tokens(settings: Mapping[str, Any], backend: Backend) -> dict[str, AddedToken]:
    """Special tokens by name: the usual ones first, then a model's own, such as image_token."""
    given = {name: settings[name] for name in _ROLES if settings.get(name) is not None}
    if "pad_token" not in settings and backend.padding is not None:
        given["pad_token"] = backend.padding["pad_token"]
    own = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in _ROLES and isinstance(value, str | dict)
    }
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(group), dict):
            own.update(settings[group])
    return {name: _token(value) for name, value in {**given, **own}.items()}


def _add_tokens(
    backend: Backend, first: Iterable[AddedToken], named: Mapping[str, AddedToken], unnamed: Iterable[AddedToken]
) -> None:
    """Add tokens in this order; of special tokens those that are not added yet."""
    names = {token.content for token in named.values()}
    tokens = list(first)
    for token in tokens:
        token.special = token.special or token.content in names
    known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
    for token in [*named.values(), *unnamed]:
        if token.content not in known:
            token.special = True
            known.add(token.content)
            tokens.append(token)
    if tokens:
        backend.add_tokens(tokens)
    if backend.post_processor is None:
        backend.post_processor = _framed([], [], [])


def _framed(begin: list[str], end: list[str], ids: list[tuple[str, int | None]]) -> processors.TemplateProcessing:
    single = [*(f"{token}:0" for token in begin), "$A:0", *(f"{token}:0" for token in end)]
    pair = [*single, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _read_templates(directory: Path, settings: Mapping[str, Any]) -> Templates | None:
    """The chat templates of a directory: files of their own, or else those of tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / _TEMPLATE_DIRECTORY).glob("*.jinja"))}
    if (directory / _TEMPLATE_FILE).is_file():
        files["default"] = directory / _TEMPLATE_FILE
    if files:
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        return texts["default"] if list(texts) == ["default"] else texts
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {template["name"]: template["template"] for template in given}
    return given
