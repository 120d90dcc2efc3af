"""How byte-level tokenizers split text into words before merging: one entry per `tokenizer.ggml.pre` name.

A GGUF file does not contain its pre-tokenizer, only a name for it. The regular expressions are those of the
published tokenizer.json files of the models that the names stand for. The list has the names that occur with the
supported architectures.
"""

import difflib
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from ngc_jax.errors import UsageError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join((_ENDINGS, _WORD, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", _SPACES))
_QWEN2 = "|".join((_ENDINGS, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", _SPACES))
_SEED = "|".join((_ENDINGS, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES))

# A word is uppercase letters, then lowercase ones; letters without case, and marks, count as both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = "|".join((*_CASED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))

_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """A way to split text into words.

    Attributes:
        patterns: regular expressions applied in order; matches and the text between them become words.
        nfc: whether text is first normalised to Unicode form C.
        whole_words: whether a word that is itself a token skips the merges.
        add_bos: whether encoding with special tokens begins with BOS when the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]:
        """Returns the normalizer and pre-tokenizer for the tokenizers library."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return normalizers.NFC() if self.nfc else None, pre_tokenizers.Sequence([*splits, to_bytes])


_LLAMA3_KIND = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # The name that converters write as a default.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "starcoder": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3_KIND,
    "llama3": _LLAMA3_KIND,
    "llama-v3": _LLAMA3_KIND,
    "falcon3": _LLAMA3_KIND,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "seed-coder": PreTokenizer((_SEED,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}


def pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """Looks up a pre-tokenizer by its GGUF name.

    Raises:
        UsageError: the name is not known; `where` begins the message.
    """
    if name not in PRE_TOKENIZERS:
        near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"{where}: pre-tokenizer {name!r} is not known{hint}, expected one of "
            f"{', '.join(PRE_TOKENIZERS)}; "
            "give the model's directory with its tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]
