"""Rebuilds a model's tokenizer from the metadata of its GGUF file."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf.config import NO_TOKEN
from ngc_jax.models.gguf.pretokenizers import pre_tokenizer
from ngc_jax.models.tokenizer import Tokenizer, one_line, wrap

_LOG = logging.getLogger(__name__)

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer described by `tokenizer.*` metadata.

    Args:
        metadata: the GGUF file's metadata.
        where: the file's name, which begins error messages.

    Returns:
        A tokenizer with the file's special tokens, BOS and EOS rules and chat template.

    Raises:
        UsageError: there is no tokenizer, its kind or pre-tokenizer is unknown, or its lists do not fit
            together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        vocabulary = _vocabulary(metadata, where, {})
        backend, add_bos = _byte_level(vocabulary)
    elif kind == "llama":
        vocabulary = _vocabulary(metadata, where, _SENTENCEPIECE_IDS)
        backend, add_bos = _sentencepiece(vocabulary), True
    else:
        problem = "has no tokenizer" if kind is None else f"has a tokenizer of the unsupported kind {kind!r}"
        raise UsageError(
            f"{where}: {problem}, expected tokenizer.ggml.model to be gpt2 or llama; "
            "give the model's directory with its tokenizer.json instead"
        )
    backend.add_tokens(list(vocabulary.added()))
    special = {role: token for role, key in _ROLES.items() if (token := vocabulary.special(key)) is not None}
    template = metadata.get("tokenizer.chat_template")
    return wrap(
        backend,
        special_tokens=special,
        chat_template=template if isinstance(template, str) else None,
        add_bos="bos_token" in special and vocabulary.flag("add_bos_token", add_bos),
        add_eos="eos_token" in special and vocabulary.flag("add_eos_token", False),
        stop_tokens=[token for key in ("eot", "eom") if (token := vocabulary.special(key)) is not None],
    )


@dataclass(frozen=True)
class _Vocabulary:
    where: str
    metadata: Mapping[str, Any]
    tokens: Sequence[str]
    types: Sequence[int]
    default_ids: Mapping[str, int]

    def error(self, problem: str) -> UsageError:
        return UsageError(
            f"{self.where}: its tokenizer is damaged: {problem}; "
            "convert the model again, or give its directory with tokenizer.json"
        )

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, int):  # some writers store 0 and 1
            raise self.error(f"tokenizer.ggml.{key} is {value!r:.60}, expected true or false")
        return bool(value)

    def special(self, key: str) -> str | None:
        """The text of a special token, None when the file names none."""
        index = self.metadata.get(f"tokenizer.ggml.{key}_token_id", self.default_ids.get(key))
        if index is None or (isinstance(index, int) and index in NO_TOKEN):
            return None
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self.tokens):
            raise self.error(f"the {key} token is number {index!r:.60} of {len(self.tokens)}")
        return self.tokens[index]

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def added(self) -> Iterator[AddedToken]:
        """Tokens that are matched in a text before it is split."""
        for token, kind in zip(self.tokens, self.types, strict=True):
            if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
                yield AddedToken(token, special=kind != _USER_DEFINED, normalized=False)


def _vocabulary(metadata: Mapping[str, Any], where: str, default_ids: Mapping[str, int]) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not _all(str, tokens):
        raise UsageError(
            f"{where}: tokenizer.ggml.tokens is not a list of texts; "
            "convert the model again, or give its directory "
            "with tokenizer.json"
        )
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [_NORMAL] * len(tokens)
        if metadata.get("tokenizer.chat_template") is not None:
            _LOG.warning(
                "%s: does not say which tokens are special (no tokenizer.ggml.token_type); those of its chat template "
                "are read as ordinary text: give the tokenizer of the original model",
                where,
            )
    vocabulary = _Vocabulary(where, metadata, tokens, types, default_ids)
    for key in ("ggml.tokens", "ggml.merges", "chat_template"):
        if not is_utf8(metadata.get(f"tokenizer.{key}")):
            raise vocabulary.error(f"tokenizer.{key} has a text that is not UTF-8")
    if not isinstance(types, list) or len(types) != len(tokens) or not _all(int, types):
        raise vocabulary.error(f"tokenizer.ggml.token_type does not have one entry for each of {len(tokens)} tokens")
    return vocabulary


def is_utf8(value: Any) -> bool:
    """Whether a text of the header, or every text of a list, was UTF-8 in the file."""
    texts = value if isinstance(value, list) else [value]
    try:
        "".join(text for text in texts if isinstance(text, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _all(kind: type, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _byte_level(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """Byte-level BPE as in GPT-2; also whether texts begin with BOS when the file does not say."""
    merges = vocabulary.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not _all(str, merges):
        raise vocabulary.error("tokenizer.ggml.merges is not a list of texts")
    # "left right"; a space at the very start belongs to the left part.
    gaps = [merge.find(" ", 1) for merge in merges]
    if -1 in gaps:
        raise vocabulary.error(f"merge {merges[gaps.index(-1)]!r} is not a pair")
    pairs = [(merge[:gap], merge[gap + 1 :]) for merge, gap in zip(merges, gaps, strict=True)]
    named = vocabulary.metadata.get("tokenizer.ggml.pre")
    if named is None:
        _LOG.warning(
            "%s: does not say how text is split into words (no tokenizer.ggml.pre); the default is a guess, and the "
            "tokens may differ from those of training: give the tokenizer of the original model",
            vocabulary.where,
        )
    cut = pre_tokenizer("default" if named is None else str(named), vocabulary.where)
    backend = Backend(_bpe(vocabulary, pairs, ignore_merges=cut.whole_words))
    normalizer, backend.pre_tokenizer = cut.build()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return backend, cut.add_bos


def _sentencepiece(vocabulary: _Vocabulary) -> Backend:
    """SentencePiece BPE: merges follow from scores; characters without a token become bytes."""
    scores = vocabulary.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens) or not all(map(_is_score, scores)):
        raise vocabulary.error("tokenizer.ggml.scores does not have one number for each token")
    merges = _merges_from_scores(vocabulary, scores)
    unknown = vocabulary.special("unknown")
    backend = Backend(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_marks = normalizers.Replace(" ", _SPACE)
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_marks])
        backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = to_marks
        backend.decoder = decoders.Sequence(to_text)
    return backend


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Lists every way to join two tokens into a third, the best-scored third first.

    SentencePiece joins the adjacent pair whose union scores best; BPE joins the pair that is earliest in its
    list.
    """
    ids = {
        token: index for token, index in vocabulary.ids().items() if vocabulary.types[index] in (_NORMAL, _USER_DEFINED)
    }
    found = [
        (-scores[index], index, ids[token[:cut]], cut, token)
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(token[:cut], token[cut:]) for *_, cut, token in sorted(found)]


def _bpe(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary.ids(), list(merges), **options)
    except Exception as error:  # the library's own error types are not public
        raise vocabulary.error(f"its merges do not fit its tokens ({one_line(error)})") from None
