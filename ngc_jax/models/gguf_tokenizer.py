"""Rebuilds a model's tokenizer from the metadata of its GGUF file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf_pretokenizers import pre_tokenizer
from ngc_jax.models.tokenizer import Tokenizer, wrap

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "▁"


@dataclass(frozen=True)
class _Vocabulary:
    where: str
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def special(self, key: str, default: int | None = None) -> str | None:
        """The text of a special token such as bos, None when the file names none."""
        index = self.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise UsageError(
                f"{self.where}: {key} token {index!r} is outside the vocabulary of {len(self.tokens)}; "
                "convert the model again"
            )
        return self.tokens[index]

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def added(self) -> Iterable[AddedToken]:
        """Tokens that are found in the text before it is split, longest first where they overlap."""
        for token, kind in zip(self.tokens, self.types, strict=True):
            if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
                yield AddedToken(token, special=kind != _USER_DEFINED, normalized=False)


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer described by `tokenizer.*` metadata.

    Args:
        metadata: the GGUF file's metadata.
        where: the file's name, which begins error messages.

    Returns:
        A tokenizer with the file's special tokens, BOS and EOS rules and chat template.

    Raises:
        UsageError: there is no tokenizer, its kind or pre-tokenizer is unknown, or its lists do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        problem = "has no tokenizer" if kind is None else f"has a tokenizer of unsupported kind {kind!r}"
        raise UsageError(
            f"{where}: {problem}, expected tokenizer.ggml.model to be {' or '.join(_BUILDERS)}; "
            "use the model's directory with a tokenizer.json instead"
        )
    vocabulary = _vocabulary(metadata, where)
    backend, add_bos, default_ids = _BUILDERS[kind](vocabulary)
    backend.add_tokens(list(vocabulary.added()))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": vocabulary.special(key, default_ids.get(role)) for role, key in roles.items()}
    ends = (vocabulary.special("eot"), vocabulary.special("eom"))
    return wrap(
        backend,
        special_tokens={role: token for role, token in special.items() if token is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos=vocabulary.flag("add_bos_token", add_bos) and special["bos_token"] is not None,
        add_eos=vocabulary.flag("add_eos_token", False) and special["eos_token"] is not None,
        stop_tokens=[token for token in ends if token is not None],
    )


def _vocabulary(metadata: Mapping[str, Any], where: str) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UsageError(
            f"{where}: tokenizer.ggml.tokens is missing or no list of texts; "
            "use the model's directory with a tokenizer.json instead"
        )
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UsageError(
            f"{where}: tokenizer.ggml.token_type does not fit the tokens; convert the model again"
        )
    return _Vocabulary(where, tokens, types, metadata)


def _byte_level(vocabulary: _Vocabulary) -> tuple[Backend, bool, dict[str, int]]:
    """Byte-level BPE as of GPT-2: merges in the file, pre-tokenizer by name."""
    merges = vocabulary.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UsageError(f"{vocabulary.where}: tokenizer.ggml.merges is missing; convert the model again")
    cut = pre_tokenizer(str(vocabulary.metadata.get("tokenizer.ggml.pre", "default")), vocabulary.where)
    # A merge is written "left right"; the left part may itself begin with a space, never the separator.
    pairs = [(merge[: (gap := merge.find(" ", 1))], merge[gap + 1 :]) for merge in merges]
    try:
        model = models.BPE(vocabulary.ids(), pairs, ignore_merges=cut.whole_words)
    except Exception as error:  # tokenizers raises plain Exception for a merge outside the vocabulary
        raise UsageError(
            f"{vocabulary.where}: the tokenizer's merges do not fit its tokens ({error}); convert the model again"
        ) from None
    backend = Backend(model)
    normalizer, splitter = cut.build()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return backend, cut.add_bos, {}


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Backend, bool, dict[str, int]]:
    """SentencePiece BPE: merges follow from the scores, characters outside the vocabulary become bytes."""
    scores = vocabulary.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise UsageError(
            f"{vocabulary.where}: tokenizer.ggml.scores does not fit the tokens; convert the model again"
        )
    default_ids = {"bos": 1, "eos": 2, "unk": 0}
    ids = vocabulary.ids()
    model = models.BPE(
        ids,
        _merges_from_scores(ids, vocabulary.types, scores),
        unk_token=vocabulary.special("unknown", default_ids["unk"]),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    space_prefix = vocabulary.flag("add_space_prefix", True)
    to_marks = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), to_marks]) if space_prefix else to_marks
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return backend, True, default_ids


def _merges_from_scores(
    ids: Mapping[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Lists every way to join two tokens into a third, the best-scored third first.

    SentencePiece joins the adjacent pair whose union has the best score; BPE joins the pair earliest in its list.
    """
    mergeable = {token: index for token, index in ids.items() if types[index] == _NORMAL}
    found = [
        (-scores[index], mergeable[token[:cut]], mergeable[token[cut:]], token, cut)
        for token, index in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    return [(token[:cut], token[cut:]) for *_, token, cut in sorted(found)]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
