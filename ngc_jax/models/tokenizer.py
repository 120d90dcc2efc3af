"""A thin wrapper around transformers' fast tokenizers: text in, int32 token ids out, and back."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

# Tokens that end a turn in the chat formats of the supported families.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_GENERATION_CONFIG = "generation_config.json"
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        stop_tokens: ids at which generation ends, the EOS token first.
    """

    def __init__(self, fast: "PreTrainedTokenizerFast", stop_tokens: Iterable[int] = ()) -> None:
        """Wraps a tokenizer of transformers.

        Args:
            fast: the tokenizer; one that truncates or pads is told not to.
            stop_tokens: ids that end generation, besides EOS and the known ends of a turn.
        """
        self._fast = fast
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        eos = [] if fast.eos_token_id is None else [fast.eos_token_id]
        added = {token.content: index for index, token in fast.added_tokens_decoder.items()}
        ends = [added[token] for token in _TURN_ENDS if token in added]
        self.stop_tokens: tuple[int, ...] = tuple(dict.fromkeys([*eos, *ends, *stop_tokens]))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Loads the tokenizer files of a Hugging Face model directory; never runs code from it.

        Raises:
            UsageError: the directory has no tokenizer files, or they cannot be read.
        """
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise UsageError(
                f"{directory}: has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}; "
                "copy the tokenizer files of the original model there"
            )
        try:
            with quiet_transformers():
                from transformers import AutoTokenizer

                fast = AutoTokenizer.from_pretrained(
                    str(directory), trust_remote_code=False, local_files_only=True
                )
        except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{directory}: its tokenizer cannot be loaded ({reason}); copy the original model's files again"
            ) from None
        if not getattr(fast, "is_fast", False):
            raise UsageError(
                f"{directory}: its tokenizer has no fast version; save it as tokenizer.json with transformers first"
            )
        return cls(fast, _generation_stops(directory))

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids, added tokens included."""
        return len(self._fast)

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._fast.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        return self._fast.eos_token_id

    @property
    def pad(self) -> int:
        """The id to fill up a batch with: the padding token, else EOS, else 0."""
        for index in (self._fast.pad_token_id, self._fast.eos_token_id):
            if index is not None:
                return index
        return 0

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self._fast.chat_template is not None

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Encodes a text of any length.

        Args:
            text: the text. Special tokens written out in it are recognised.
            special_tokens: whether to add what the model expects around a text, such as BOS.

        Returns:
            (L,) int32 ids.
        """
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Turns (L,) ids back into text."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Renders a conversation as the model was trained to see it, ready for the assistant's answer.

        Args:
            messages: dicts with "role" (system, user or assistant) and "content".

        Returns:
            (L,) int32 ids.

        Raises:
            UsageError: the model has no chat template, or the template refuses these messages.
        """
        if not self.has_chat_template:
            raise UsageError(
                "this model has no chat template; give it plain text, or choose an instruction-tuned model"
            )
        try:
            text = self._fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja2 errors of many kinds
            raise UsageError(
                f"the chat template refuses these messages ({error}); check roles and order"
            ) from None
        return self.encode(text)

    def save(self, directory: Path) -> None:
        """Writes the files from which transformers' AutoTokenizer and `load` restore this tokenizer.

        They are tokenizer.json, tokenizer_config.json, the chat template if any, and generation_config.json with the
        stop tokens unless one is there.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._fast.save_pretrained(str(directory))
        generation = directory / _GENERATION_CONFIG
        if not generation.exists():
            settings = {
                "bos_token_id": self.bos_token_id,
                "eos_token_id": list(self.stop_tokens),
                "pad_token_id": self.pad,
            }
            generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def wrap(
    backend: "Backend",
    *,
    special_tokens: Mapping[str, str],
    chat_template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    stop_tokens: Iterable[str] = (),
) -> Tokenizer:
    """Makes a Tokenizer of a `tokenizers.Tokenizer`.

    Args:
        backend: the tokenizer proper.
        special_tokens: token texts by transformers' names: bos_token, eos_token, unk_token, pad_token.
        chat_template: jinja template of the chat format.
        add_bos: whether encoding with special tokens begins with BOS.
        add_eos: whether it ends with EOS.
        stop_tokens: texts of tokens that end generation besides EOS.
    """
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=chat_template,
            add_bos_token=add_bos,
            add_eos_token=add_eos,
            clean_up_tokenization_spaces=False,
            **special_tokens,
        )
    return Tokenizer(fast, [fast.convert_tokens_to_ids(token) for token in stop_tokens])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from telling users, on import, that PyTorch is missing: tokenizers do not need it."""
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_ADVICE]
        else:
            os.environ[_NO_ADVICE] = before


def _generation_stops(directory: Path) -> list[int]:
    path = directory / _GENERATION_CONFIG
    if not path.is_file():
        return []
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        eos = found.get("eos_token_id")
    except (ValueError, AttributeError):
        raise UsageError(f"{path}: is no JSON object; copy the original file again or delete it") from None
    return [index for index in (eos if isinstance(eos, list) else [eos]) if isinstance(index, int)]
