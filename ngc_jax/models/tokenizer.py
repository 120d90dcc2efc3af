"""Tokenizers: text in, int32 token ids out, and back; conversations by the model's chat template."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import parse_json
from ngc_jax.models.fast_tokenizer import TOKENIZER_FILE, FastTokenizer
from ngc_jax.models.tokenizer_model import load_slow_tokenizer
from ngc_jax.tokens import Bos

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

# Tokens that end a turn in the chat formats of the supported families.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json")
_GENERATION_CONFIG = "generation_config.json"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        stop_tokens: ids at which generation ends, the EOS token first.
    """

    def __init__(self, fast: "FastTokenizer | PreTrainedTokenizerFast", stop_tokens: Iterable[int] = ()) -> None:
        """Wraps a tokenizer.

        Args:
            fast: the tokenizer, ours or one of transformers; truncation and padding are disabled.
            stop_tokens: ids that end generation, besides EOS and the known ends of a turn.
        """
        self._fast = fast if isinstance(fast, FastTokenizer) else FastTokenizer.of_transformers(fast)
        self._backend = self._fast.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        eos = [] if self.eos_token_id is None else [self.eos_token_id]
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
                "copy the original model's tokenizer files there"
            )
        stops = [*_stops(directory / _GENERATION_CONFIG), *_stops(directory / "config.json")]
        try:
            # Whatever class tokenizer_config.json names: some replace the pre-tokenizer of tokenizer.json by their own,
            # and SmolLM2 loses its digits that way.
            complete = (directory / TOKENIZER_FILE).is_file()
            return cls(FastTokenizer.load(directory) if complete else load_slow_tokenizer(directory), stops)
        except BaseException as error:  # parsers raise errors of many kinds; Rust's panics are not Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit | UsageError):
                raise
            raise UsageError(
                f"{directory}: its tokenizer cannot be loaded ({one_line(error)}); "
                "copy the original model's tokenizer files again"
            ) from None

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens, added ones included."""
        return self._backend.get_vocab_size()

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._fast.token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        return self._fast.token_id("eos_token")

    def prefix(self, bos: Bos = "auto") -> tuple[int, ...]:
        """The ids before a text.

        Args:
            bos: auto for the tokenizer's own rule (`add_bos_token`, its post-processor), always for its BOS token,
                never for none.

        Raises:
            UsageError: If bos is `always` and the tokenizer has no BOS token.
        """
        if bos == "never":
            return ()
        if bos == "always":
            if self.bos_token_id is None:
                raise UsageError("this tokenizer has no BOS token; choose auto or never")
            return (self.bos_token_id,)
        # Encoded around a text of one known token: a special token, if there are any.
        known = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        with _refuse_failures("encode a text"):
            (framed,) = self._backend.encode_batch_fast([known[0] if known else "a"], add_special_tokens=True)
        own = [place for place, sequence in enumerate(framed.sequence_ids) if sequence is not None]
        return tuple(framed.ids[: own[0]]) if own else ()

    def encode_prompt(self, text: str, bos: Bos = "auto") -> np.ndarray:
        """Encodes a text to be continued: with its prefix, unless the text already begins with it, and no suffix.

        Args:
            text: the text.
            bos: as for `prefix`.

        Returns:
            (L,) int32 ids.
        """
        prefix, ids = self.prefix(bos), self.encode(text)
        if not prefix or tuple(ids[: len(prefix)].tolist()) == prefix:
            return ids
        return np.concatenate([np.asarray(prefix, np.int32), ids])

    @property
    def pad(self) -> int:
        """The id for padding a batch: the padding token, else EOS, else 0."""
        known = [index for index in (self._fast.token_id("pad_token"), self.eos_token_id) if index is not None]
        return known[0] if known else 0

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self._fast.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that `render_chat` fills without tools; None if the model has none."""
        return self._fast.template(tools=False) if self.has_chat_template else None

    def __call__(self, text: str | Sequence[str], special_tokens: bool = True) -> np.ndarray | list[np.ndarray]:
        """Encodes a text as (L,) ids, or several as a list of them, with the special tokens around a text.

        >>> tokenizer("The capital of France is")  # doctest: +SKIP
        array([ 504, 3575,  282, 4649,  314], dtype=int32)

        Raises:
            UsageError: it is not a text.
        """
        if isinstance(text, str):
            return self.encode(text, special_tokens)
        if not isinstance(text, list | tuple):
            raise _no_text(text, "expected a text (str), or a list of texts")
        return [self.encode(one, special_tokens) for one in text]

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Encodes a text of any length.

        Args:
            text: the text. Special tokens written out in it are recognised.
            special_tokens: whether to add the special tokens around a text, such as BOS.

        Returns:
            (L,) int32 ids.

        Raises:
            UsageError: it is not a text.
        """
        if not isinstance(text, str):
            raise _no_text(text, "expected a text (str); for a list of texts call the tokenizer itself")
        # A lone surrogate, for example from a path, is not a character that a tokenizer knows.
        text = text.encode(errors="replace").decode() if not text.isascii() else text
        # The batch call omits offsets, which saves a third of the time.
        with _refuse_failures("encode this text"):
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)
            return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Decodes (L,) ids to text; of a batch (1, L) the single row.

        Ids that the tokenizer does not have, such as those of an embedding's padding rows, are skipped.

        Raises:
            UsageError: they are not ids.
        """
        try:
            array = np.asarray(ids)
        except ValueError:
            raise UsageError("lists of unequal lengths to decode; expected (L,) whole numbers: decode each") from None
        array = array[0] if array.ndim == 2 and len(array) == 1 else array
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise UsageError(
                f"ids of shape {array.shape} and type {array.dtype} to decode; expected (L,) whole numbers"
            )
        if array.size and not 0 <= array.min() <= array.max() < 2**31:
            raise UsageError(f"ids from {array.min()} to {array.max()} to decode; expected 0 to 2^31 - 1")
        with _refuse_failures("decode these ids"):
            return self._backend.decode(array.tolist(), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> np.ndarray:
        """Encodes a conversation in the model's chat format, by default ready for the assistant's answer.

        Args:
            messages: dicts with "role" (system, user or assistant) and "content".
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: whether to end where the assistant's answer begins.
            variables: further variables of the model's template, such as `enable_thinking`.

        Returns:
            (L,) int32 ids.

        Raises:
            UsageError: the model has no chat template, or the template refuses these messages.
        """
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that `apply_chat_template` encodes; arguments as there.

        Raises:
            UsageError: as there.
        """
        if not self.has_chat_template:
            raise UsageError(
                "this model has no chat template; give it plain text, or choose an instruction-tuned model"
            )
        _check_messages(messages)
        from ngc_jax.models.chat_template import render_chat

        try:
            return render_chat(
                self._fast.template(tools=tools is not None),
                messages,
                special_tokens=self._fast.special_tokens,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                variables=variables,
            )
        except Exception as error:  # templates raise errors of many kinds
            raise UsageError(
                f"the chat template refuses these messages ({one_line(error)}); check their roles and order"
            ) from None

    def save(self, directory: Path) -> None:
        """Writes the files from which transformers' AutoTokenizer and `load` restore this tokenizer.

        They are tokenizer.json, tokenizer_config.json, the chat template if any, and generation_config.json
        with the stop tokens unless there is one.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._fast.save(directory)
        generation = directory / _GENERATION_CONFIG
        if not generation.exists():
            ids = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.stop_tokens)}
            _write_json(generation, {**ids, "pad_token_id": self.pad})


def _check_messages(messages: Any) -> None:
    given = messages if isinstance(messages, list | tuple) else [messages]
    if not given or not all(isinstance(message, Mapping) for message in given) or given is not messages:
        raise UsageError(
            'a conversation is a list of messages; expected at least one, such as {"role": "user", "content": "Hello"}'
        )


def _no_text(text: Any, expected: str) -> UsageError:
    return UsageError(f"{type(text).__name__} given to a tokenizer; {expected}")


@contextmanager
def _refuse_failures(what: str) -> Iterator[None]:
    """Converts every error of the tokenizers library, whose panics are not Exceptions, to a UsageError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UsageError(
            f"the tokenizer cannot {what} ({one_line(error)}); if it is damaged, copy the original model's files again"
        ) from None


def wrap(
    backend: "Backend",
    *,
    special_tokens: Mapping[str, str],
    chat_template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    stop_tokens: Iterable[str] = (),
) -> Tokenizer:
    """Makes a Tokenizer from a `tokenizers.Tokenizer`.

    Args:
        backend: the wrapped tokenizer, which is changed.
        special_tokens: token texts by transformers' names: bos_token, eos_token, unk_token, pad_token.
        chat_template: jinja template of the chat format.
        add_bos: whether encoding with special tokens begins with BOS.
        add_eos: whether it ends with EOS.
        stop_tokens: texts of tokens that end generation besides EOS.
    """
    fast = FastTokenizer.of_backend(
        backend, special_tokens, chat_template=chat_template, add_bos=add_bos, add_eos=add_eos
    )
    ids = (backend.token_to_id(token) for token in stop_tokens)
    return Tokenizer(fast, [index for index in ids if index is not None])


def one_line(error: BaseException, width: int = 160) -> str:
    """Another library's error as part of a one-line message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stops(path: Path) -> list[int]:
    """The EOS ids in generation_config.json or config.json: one, a list, or none."""
    if not path.is_file():
        return []
    try:
        settings: Any = parse_json(path.read_text(encoding="utf-8-sig"))
        text = settings.get("text_config")
        places = (settings, text if isinstance(text, dict) else {})
    except (ValueError, AttributeError):
        raise UsageError(f"{path}: is not a JSON object; copy the original file again, or delete it") from None
    found = [place.get("eos_token_id") for place in places]
    flat = [index for eos in found for index in (eos if isinstance(eos, list) else [eos])]
    return [index for index in flat if isinstance(index, int) and not isinstance(index, bool)]
