"""The training data: sources, batches, and the conversion of a document to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.training import packing
from ngc_jax.training.field_types import check_field_types
from ngc_jax.training.packing import TokenDocument
from ngc_jax.training.sources import Document, SourceConfig


@dataclass(frozen=True)
class DataConfig:
    """The sources of training data, and how they are cut into batches.

    Args:
        sources: Names of sources, or sources with their options (as `SourceConfig`, or a dict of its fields as in a
            YAML file). With several sources, each row comes from one.
        sequence_length: Tokens of a row.
        batch_size: Rows of a batch, over all processes.
        packing: concatenate joins documents and cuts them at the end of a row; pack keeps documents whole.
        long_documents: With pack, cut documents that are longer than a row, or drop them.
        mask_prompts: Whether prompts are left out of the loss.
        prompts: plain puts the separator after a prompt; chat renders it by the tokenizer's chat template.
        separator: Between a plain prompt and the text.
        begin_token: Whether documents, and rows that continue one, begin with the tokenizer's BOS; by default its own
            rule decides.
        end_token: Whether an end-of-text token follows documents. A source of one document has none if concatenated.
        shuffle: Whether rows, or a stream's documents, are shuffled, differently in every epoch.
        seed: Of the order.
        epochs: Number of passes over the source; unlimited by default. For one source that is read whole.
        remainder: Drop the rows that do not fill a batch at an epoch's end, or pad the batch with empty rows.
        window: Documents of a stream that are shuffled and packed at once.
        prefetch: Batches prepared in advance by a thread; 0 for none.
    """

    sources: Sequence[SourceConfig | str | dict[str, Any]] = ("pydoc:first-half",)
    sequence_length: int = 1024
    batch_size: int = 8
    packing: Literal["concatenate", "pack"] = "concatenate"
    long_documents: packing.LongDocuments = "cut"
    mask_prompts: bool = True
    prompts: Literal["plain", "chat"] = "plain"
    separator: str = "\n"
    begin_token: bool | None = None
    end_token: bool = True
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    remainder: Literal["drop", "pad"] = "drop"
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range and incompatible options."""
        if isinstance(self.sources, str) or not self.sources:
            raise UsageError(f"sources is {self.sources!r}; expected a list of at least one source")
        check_field_types(self)
        least = {"sequence_length": 2, "batch_size": 1, "seed": 0, "window": 1, "prefetch": 0, "epochs": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}; expected at least {smallest}")
        opened = self.opened
        if self.epochs is not None and (len(opened) > 1 or opened[0].streaming):
            raise UsageError("epochs need one source that is read whole; leave out epochs, and give the steps to train")

    @property
    def opened(self) -> tuple[SourceConfig, ...]:
        """The sources with their options."""
        return tuple(_source(source) for source in self.sources)


def _source(source: SourceConfig | str | dict[str, Any]) -> SourceConfig:
    if isinstance(source, SourceConfig):
        return source
    options = {"name": source} if isinstance(source, str) else dict(source)
    known = {field.name for field in fields(SourceConfig)}
    if not {"name"} <= set(options) <= known:
        others = ", ".join(sorted(known - {"name"}))
        raise UsageError(f"a source has the options {', '.join(map(str, options))}; expected name, and any of {others}")
    return SourceConfig(**options)


def tokenise(
    document: Document | TokenDocument, tokenizer: Tokenizer, config: DataConfig, *, ends: bool = True
) -> TokenDocument:
    """Tokens of a document by the rules of `config`; empty if it has no text.

    Raises:
        UsageError: If the tokenizer lacks a required token or chat template.
    """
    if isinstance(document, TokenDocument):
        return TokenDocument(document.tokens, document.prompt if config.mask_prompts else 0)
    if not document.text:
        return TokenDocument(np.zeros(0, np.int32))
    before: list[np.ndarray] = []
    if document.prompt and config.prompts == "chat":
        before.append(tokenizer.apply_chat_template([{"role": "user", "content": document.prompt}]))
    elif document.prompt:
        before.append(tokenizer.encode(document.prompt + config.separator))
    after = [tokenizer.encode(document.text)]
    if config.end_token and ends:
        after.append(_special(tokenizer.eos_token_id, "end_token"))
    prompt = sum(map(len, before)) if config.mask_prompts else 0
    return TokenDocument(np.concatenate([*before, *after]), prompt)


def prefix_of(tokenizer: Tokenizer, config: DataConfig) -> tuple[int, ...]:
    """The prefix of the part of a document that is in a row.

    Raises:
        UsageError: If `begin_token` is true and the tokenizer has no such token.
    """
    if config.begin_token is None:
        return tokenizer.prefix()
    return (int(_special(tokenizer.bos_token_id, "begin_token")[0]),) if config.begin_token else ()


def _special(token: int | None, option: str) -> np.ndarray:
    if token is None:
        raise UsageError(f"the tokenizer lacks the token that {option} requires; set {option} to false")
    return np.array([token], np.int32)
