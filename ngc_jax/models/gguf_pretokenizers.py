"""How byte-level tokenizers cut text into words before merging: one entry per `tokenizer.ggml.pre` name.

A GGUF file does not contain its pre-tokenizer, only a name for it. The regular expressions are those of the
published tokenizer.json files of the models that the names stand for.
"""

import difflib
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from ngc_jax.errors import UsageError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join((_ENDINGS, _WORD, r"\p{N}{1,3}", _SIGNS, _SPACES))
_QWEN2 = "|".join((_ENDINGS, _WORD, r"\p{N}", _SIGNS, _SPACES))
_QWEN35 = "|".join(
    (_ENDINGS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES)
)

# A word is capitals, then small letters; letters without case, and marks, count as both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join((*_CASED, r"\p{N}", _SIGNS_SLASH, _SPACES))
_GPT4O = "|".join((*(f"{word}{_ENDINGS}?" for word in _CASED), r"\p{N}{1,3}", _SIGNS_SLASH, _SPACES))

_DEEPSEEK3 = "|".join(
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    )
)


@dataclass(frozen=True)
class PreTokenizer:
    """A way to cut text.

    Attributes:
        patterns: regular expressions applied one after the other; matches and what lies between become words.
        nfc: whether text is first brought to Unicode normal form C.
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


def _alike(names: str, kind: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), kind)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # What converters write when they know no better.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    **_alike("gpt-2 phi-2 mpt olmo jais trillion modern-bert gigachat", PreTokenizer((_GPT2,))),
    **_alike(
        "smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer((r"\p{N}", _GPT2))
    ),
    **_alike(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2",
        PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True),
    ),
    **_alike("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    **_alike("deepseek-r1-qwen stablelm2 megrez hunyuan grok-2", PreTokenizer((_QWEN2,))),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
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
