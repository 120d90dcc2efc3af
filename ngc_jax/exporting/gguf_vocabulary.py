"""A tokenizer as the metadata of a GGUF file.

GGUF has no pre-tokenizer, only names of known ones: the name is found by behaviour, by splitting texts on which the
known ones differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf.pretokenizers import PRE_TOKENIZERS
from ngc_jax.models.tokenizer import Tokenizer

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Texts on which the known pre-tokenizers differ: runs of digits, contractions in capitals, ends of lines, runs of
# spaces, changes of case, punctuation beside letters, marks, scripts without spaces.
_PROBES = (
    "The 3 quick foxes jumped over 12345 lazy dogs 1234567890; they've said “it's 1998!”",
    "I'LL don't stop, you're right.\r\n\n\n    for i in range(10):\n\t\tprint(f'{i:03d} => {i**2}')",
    "HelloWorld HTTPServer camelCase a/b x1;\n\ny, naïve cafe\u0301 Ångström ½ x² 你好世界 안녕 🙂.",
    "(a) $5 <b> c=d+e | f~g ^h  i   j\n k's K'S\n\n",
)


def vocabulary_metadata(tokenizer: Tokenizer, size: int, name: str) -> dict[str, Any]:
    """The keys `tokenizer.*` of a GGUF file.

    Args:
        tokenizer: The model's.
        size: Rows of the model's embedding; tokens are padded to it, and refused beyond it.
        name: The model's name, for messages.

    Returns:
        Values by key: strings, integers, booleans and lists of one type.

    Raises:
        UsageError: If GGUF has no name for its kind, or it has more tokens than the model.
    """
    with tempfile.TemporaryDirectory(prefix="ngc-jax-") as directory:
        tokenizer.save(Path(directory))
        data = json.loads((Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((Path(directory) / "tokenizer_config.json").read_text(encoding="utf-8"))
        template_file = Path(directory) / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        template = template if template is not None else settings.get("chat_template")
    model = data["model"]
    if model["type"] != "BPE":
        raise UsageError(
            f"the tokenizer of {name} is of type {model['type']}, which cannot be written as GGUF; expected BPE"
        )
    byte_level = not model.get("byte_fallback")
    tokens, types = _tokens(data, size, name, byte_level)
    keys: dict[str, Any] = {
        "ggml.model": "gpt2" if byte_level else "llama",
        "ggml.pre": _pre_tokenizer(Backend.from_str(json.dumps(data)), model, name) if byte_level else "default",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if byte_level:
        keys["ggml.merges"] = merges
    else:
        keys["ggml.scores"] = _scores(tokens, types, merges)
        keys["ggml.add_space_prefix"] = "Prepend" in json.dumps(data.get("normalizer")) or _prepends(data)
    plain, framed = tokenizer.encode("a").tolist(), tokenizer.encode("a", special_tokens=True).tolist()
    keys["ggml.add_bos_token"] = len(framed) > len(plain) and framed[0] == tokenizer.bos_token_id
    keys["ggml.add_eos_token"] = len(framed) > len(plain) and framed[-1] == tokenizer.eos_token_id
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad}
    others = [token for token in tokenizer.stop_tokens if token != tokenizer.eos_token_id]
    ids |= {"eot": others[0]} if others else {}
    unknown = model.get("unk_token")
    ids |= {"unknown": tokens.index(unknown)} if unknown in tokens else {}
    keys |= {f"ggml.{role}_token_id": index for role, index in ids.items() if index is not None}
    if isinstance(template, str):
        keys["chat_template"] = template
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def _tokens(data: Mapping[str, Any], size: int, name: str, byte_level: bool) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    texts: dict[int, tuple[str, int]] = {}
    unknown = data["model"].get("unk_token")
    for token, index in data["model"]["vocab"].items():
        kind = _UNKNOWN if token == unknown else _NORMAL
        if not byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        texts[index] = (token, kind)
    for token in data.get("added_tokens", []):
        kind = _CONTROL if token["special"] else _USER_DEFINED
        texts[token["id"]] = (token["content"], _UNKNOWN if token["content"] == unknown else kind)
    if max(texts, default=0) >= size:
        raise UsageError(
            f"the tokenizer of {name} has ids up to {max(texts)}, its embedding {size} rows; give the model its own "
            "tokenizer"
        )
    rows = [texts.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """SentencePiece's scores: the earlier a token is merged, the higher; tokens never merged get the lowest."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, index)
    lowest = float(len(merges))
    return [
        -float(rank.get(token, lowest)) if kind in (_NORMAL, _USER_DEFINED) else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _prepends(data: Mapping[str, Any]) -> bool:
    """Whether a Metaspace pre-tokenizer puts a space before a text."""
    part = data.get("pre_tokenizer") or {}
    return part.get("type") == "Metaspace" and part.get("prepend_scheme") in ("always", "first")


def _pre_tokenizer(backend: Backend, model: Mapping[str, Any], name: str) -> str:
    """GGUF's name of a byte-level tokenizer's pre-tokenizer."""
    wanted = [_cut(backend.normalizer, backend.pre_tokenizer, text) for text in _PROBES]
    for known, pre in PRE_TOKENIZERS.items():
        normalizer, pre_tokenizer = pre.build()
        same = pre.whole_words == bool(model.get("ignore_merges"))
        if same and [_cut(normalizer, pre_tokenizer, text) for text in _PROBES] == wanted:
            return known
    raise UsageError(
        f"the tokenizer of {name} splits text in a way that has no name in GGUF (known: "
        f"{', '.join(PRE_TOKENIZERS)}); export it as a Hugging Face directory instead"
    )


def _cut(normalizer: Any, pre_tokenizer: Any, text: str) -> list[str]:
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer is not None else [text]
