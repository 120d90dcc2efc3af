"""Loads the tokenizer of a directory that has no tokenizer.json, with transformers.

Its files are tokenizer.model, which is SentencePiece's own format, or a vocabulary and merges.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LOG = logging.getLogger(__name__)

# The package and module with which transformers reads tokenizer.model.
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_PROBE = "The quick brown fox jumps over 12 lazy dogs, naïve ☃"


def load_slow_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Loads it with transformers; never runs code from the directory.

    Raises:
        UsageError: a package is missing, the file is not SentencePiece's, or there is no fast version.
        Exception: of any kind that transformers and its parsers raise.
    """
    if not _installed("transformers"):
        raise UsageError(
            f"{directory}: its tokenizer has no tokenizer.json, and to read its other files takes the package "
            "transformers, which is not installed; run 'pip install transformers', or save it as tokenizer.json with "
            "transformers elsewhere"
        )
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        if (directory / "tokenizer.model").is_file():
            found = load_tokenizer_model(directory)
        else:
            found = next(_loaders(directory))()
    if isinstance(found, PreTrainedTokenizerFast):
        return found
    raise UsageError(
        f"{directory}: its tokenizer has no fast version; save it as tokenizer.json with transformers first"
    )


def load_tokenizer_model(directory: Path) -> Any:
    """Loads it with the class of transformers that splits text as SentencePiece itself does.

    transformers chooses by the names in tokenizer_config.json and config.json. Where these are missing or ambiguous, it
    omits the space that tokenizer.model puts before a text.

    Raises:
        UsageError: a package is missing, or the file is not SentencePiece's.
        Exception: of any kind that transformers and its parsers raise.
    """
    file = directory / "tokenizer.model"
    package = _missing_package(file)
    if package is not None:
        raise UsageError(
            f"{directory}: its tokenizer.model needs the package {package}, which is not installed; run "
            f"'pip install {package}'"
        )
    loaders = _loaders(directory)
    if _is_tiktoken(file):
        return next(loaders)()
    expected = _ids_of_sentencepiece(file)
    first = next(loaders)()
    if _ids(first) == expected:
        return first
    for load in loaders:
        try:
            other = load()
        except Exception:  # the class may need missing files
            continue
        if _ids(other) == expected:
            return other
    _LOG.warning(
        "%s: transformers reads a tokenizer that splits text differently from tokenizer.model; save it as "
        "tokenizer.json first, or give another tokenizer",
        directory,
    )
    return first


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses transformers' message on import that PyTorch is missing."""
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_ADVICE, None)
        else:
            os.environ[_NO_ADVICE] = before


def _loaders(directory: Path) -> Iterator[Callable[[], Any]]:
    from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

    for kind in (AutoTokenizer, LlamaTokenizer, GemmaTokenizer):
        yield partial(kind.from_pretrained, str(directory), trust_remote_code=False, local_files_only=True)


def _ids(tokenizer: "PreTrainedTokenizerFast") -> list[int] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.encode(_PROBE, add_special_tokens=False).ids


def _missing_package(file: Path) -> str | None:
    """The name of a package that is needed to read the file and is not installed."""
    packages = {"tiktoken": "tiktoken"} if _is_tiktoken(file) else _PACKAGES
    return next((name for name, module in packages.items() if not _installed(module)), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _is_tiktoken(file: Path) -> bool:
    """Whether it is a list of tokens in base 64, which some models store under the same name."""
    with file.open("rb") as opened:
        return _TIKTOKEN_LINE.fullmatch(opened.readline(1000)) is not None


def _ids_of_sentencepiece(file: Path) -> list[int]:
    """SentencePiece's own encoding of the probe."""
    from sentencepiece import SentencePieceProcessor

    try:
        return list(SentencePieceProcessor(model_file=str(file)).encode(_PROBE))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{file}: is not a SentencePiece model ({reason}); copy the original file again") from None
