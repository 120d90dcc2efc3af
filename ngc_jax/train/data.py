"""From sources to batches: tokens, rows, order, shares of processes, and a position to go on from.

Sources that are read whole become rows once, and any step is known from its number: its rows, their order, and the
process that has each. So the position is a number, the same on every process and for any number of them. With a
stream among the sources the rows of a step come from a fixed number of parts, and the position says where each is.
"""

from __future__ import annotations

import json
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, Literal

import grain
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.train import packing
from ngc_jax.train.packing import Corpus, Layout, Row, TokenDocument
from ngc_jax.train.sources import Document, SourceConfig, Stream, open_source

Position = dict[str, Any]
Gather = Callable[[Position], Sequence[Position]]
_ENDLESS = sys.maxsize
_FREE = ("epochs", "prefetch")  # may change while a run goes on


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it is cut into batches.

    Args:
        sources: Names of sources, or sources with their options (as `SourceConfig`, or a dict of its fields as in a
            YAML file). Of several, each row is taken from one.
        sequence_length: Tokens of a row.
        batch_size: Rows of a batch, over all processes.
        packing: concatenate joins documents and cuts them at the end of a row; pack keeps documents whole.
        long_documents: With pack, cut documents that are longer than a row, or drop them.
        mask_prompts: Whether prompts are left out of the loss.
        prompts: plain puts the separator after a prompt; chat renders it by the tokenizer's chat template.
        separator: Between a plain prompt and the text.
        begin_token: Whether documents begin with the tokenizer's token for it.
        end_token: Whether an end-of-text token follows documents. A source of one document has none if concatenated.
        shuffle: Whether rows, or a stream's documents, are shuffled, otherwise in every epoch.
        seed: Of the order.
        epochs: How often to go through the source; without end if not given. For one source that is read whole.
        remainder: Drop the rows that fill no batch at an epoch's end, or pad the batch with empty rows.
        window: Documents of a stream that are shuffled and packed at once.
        prefetch: Batches made ahead by a thread; 0 for none.
    """

    sources: Sequence[SourceConfig | str | dict[str, Any]] = ("pydoc:first-half",)
    sequence_length: int = 1024
    batch_size: int = 8
    packing: Literal["concatenate", "pack"] = "concatenate"
    long_documents: packing.LongDocuments = "cut"
    mask_prompts: bool = True
    prompts: Literal["plain", "chat"] = "plain"
    separator: str = "\n"
    begin_token: bool = False
    end_token: bool = True
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    remainder: Literal["drop", "pad"] = "drop"
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Raises UsageError for what is out of range and what does not go together."""
        if isinstance(self.sources, str) or not self.sources:
            raise UsageError(f"sources is {self.sources!r}; expected a list of at least one source")
        least = {"sequence_length": 2, "batch_size": 1, "seed": 0, "window": 1, "prefetch": 0, "epochs": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}; expected at least {smallest}")
        choices = {
            "packing": ("concatenate", "pack"),
            "long_documents": ("cut", "drop"),
            "prompts": ("plain", "chat"),
            "remainder": ("drop", "pad"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}")
        opened = self.opened
        if self.epochs is not None and (len(opened) > 1 or opened[0].streaming):
            raise UsageError(
                "epochs are of one source that is read whole; leave epochs out, and give the steps to train"
            )

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
        raise UsageError(f"a source has the options {', '.join(options)}; expected name, and any of {others}")
    return SourceConfig(**options)


@dataclass(frozen=True)
class SourceReport:
    """What became of a source that was read whole; a stream's is not known.

    Attributes:
        name: The source's.
        documents: Documents with any text.
        tokens: Their tokens, those left out included.
        rows: Rows made of them.
        dropped_documents: Documents of which no token is in a row.
        dropped_tokens: Tokens that are in no row.
    """

    name: str
    documents: int
    tokens: int
    rows: int
    dropped_documents: int
    dropped_tokens: int


def tokenise(
    document: Document | TokenDocument, tokenizer: Tokenizer, config: DataConfig, *, ends: bool = True
) -> TokenDocument:
    """Tokens of a document as `config` says; none if it has no text.

    Raises:
        UsageError: If the tokenizer lacks a token or chat template that is asked for.
    """
    if isinstance(document, TokenDocument):
        return TokenDocument(document.tokens, document.prompt if config.mask_prompts else 0)
    if not document.text:
        return TokenDocument(np.zeros(0, np.int32))
    before = [_special(tokenizer.bos_token_id, "begin_token")] if config.begin_token else []
    if document.prompt and config.prompts == "chat":
        before.append(tokenizer.apply_chat_template([{"role": "user", "content": document.prompt}]))
    elif document.prompt:
        before.append(tokenizer.encode(document.prompt + config.separator))
    after = [tokenizer.encode(document.text)]
    if config.end_token and ends:
        after.append(_special(tokenizer.eos_token_id, "end_token"))
    prompt = sum(map(len, before)) if config.mask_prompts else 0
    return TokenDocument(np.concatenate([*before, *after]), prompt)


def _special(token: int | None, option: str) -> np.ndarray:
    if token is None:
        raise UsageError(f"the tokenizer has no such token as {option} asks for; set {option} to false")
    return np.array([token], np.int32)


def make_pipeline(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    given: Mapping[str, Sequence[Document | TokenDocument]] | None = None,
    gather: Gather | None = None,
) -> Pipeline:
    """Open the sources and make a dataset of batches.

    The batches of all processes, one below the other in the order of the processes, are the batches that one process
    alone would have.

    Args:
        config: What to train on.
        tokenizer: The model's.
        process_index: Which process this is.
        process_count: How many there are.
        given: Documents made elsewhere, by the name under which `config.sources` has them.
        gather: Returns the positions of all processes from that of this one; only used with streams and several
            processes. By default jax gathers them.

    Returns:
        A grain dataset of batches: dicts of arrays (batch_size / process_count, sequence_length), see `packing`.

    Raises:
        UsageError: If a source cannot be used or is too small, or processes do not divide the batch.
    """
    if not 0 <= process_index < process_count or config.batch_size % process_count:
        raise UsageError(
            f"process {process_index} of {process_count} cannot have a share of batches of {config.batch_size} rows; "
            "expected a number of processes that divides batch_size"
        )
    made = given or {}
    opened = [made[source.label] if source.label in made else open_source(source) for source in config.opened]
    identity = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _FREE}
    reports, tables, parts = [], {}, config.batch_size
    identity["sources"] = []
    for number, (source, documents) in enumerate(zip(config.opened, opened, strict=True)):
        if isinstance(documents, Stream):
            parts = gcd(parts, documents.shards)
            identity["sources"].append(f"{source.weight} of a stream of {documents.shards} files")
            continue
        corpus, layout, report = _table(documents, tokenizer, config, source)
        reports.append(report)
        tables[number] = _ordered(_Rows(corpus, layout, config.sequence_length, tokenizer.pad), config, number)
        check = zlib.crc32(corpus.predicted.tobytes(), zlib.crc32(corpus.tokens.tobytes()))
        identity["sources"].append(f"{source.weight} of {layout.rows} rows, {check:08x}")
    weights = [source.weight for source in config.opened]
    share = config.batch_size // process_count
    mine = range(process_index * share, (process_index + 1) * share)
    if len(tables) == len(opened):
        mixed = tables[0] if len(tables) == 1 else grain.MapDataset.mix(list(tables.values()), weights)
        rows = len(tables[0]) if len(tables) == 1 else _ENDLESS
        blank = packing.blank_row(config.sequence_length, tokenizer.pad)
        steps = _Steps(mixed, rows, config, mine, blank)
        options = grain.ReadOptions(num_threads=min(config.prefetch, 1), prefetch_buffer_size=config.prefetch)
        per_epoch = steps.per_epoch if len(tables) == 1 else None
        return Pipeline(steps.to_iter_dataset(options), identity, reports, per_epoch, None)

    def rows_of(number: int, part: int) -> grain.IterDataset:
        documents = opened[number]
        if isinstance(documents, Stream):
            return _stream_rows(documents, part, parts, number, tokenizer, config)
        return tables[number].repeat()[part::parts].to_iter_dataset(grain.ReadOptions(0, 0))

    identity["parts"] = parts
    each = config.batch_size // parts
    mixtures = {}
    for part in sorted({row // each for row in mine}):
        sources = [rows_of(number, part) for number in range(len(opened))]
        mixtures[part] = sources[0] if len(sources) == 1 else grain.IterDataset.mix(sources, weights)
    if gather is None and process_count > 1:
        gather = _gather_by_jax
    batches = _PartSteps(mixtures, each, mine, config.prefetch)
    return Pipeline(batches, identity, reports, None, gather if process_count > 1 else None)


class Pipeline(grain.IterDataset):
    """Batches of one process; `iter` of it has `get_state` and `set_state`.

    Attributes:
        reports: What became of the sources that were read whole.
        steps_per_epoch: Batches of an epoch, the same on every process; None with several sources or a stream.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        identity: dict[str, Any],
        reports: Sequence[SourceReport],
        steps_per_epoch: int | None,
        gather: Gather | None,
    ) -> None:
        """Wraps batches; see `make_pipeline`."""
        super().__init__(batches)
        self.reports, self.steps_per_epoch = tuple(reports), steps_per_epoch
        self._identity, self._gather = identity, gather

    def __iter__(self) -> PipelineIterator:
        return PipelineIterator(self._parent.__iter__(), self._identity, self._gather)


class PipelineIterator(grain.DatasetIterator):
    """Batches, and a position in them that is plain JSON."""

    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, Any], gather: Gather | None) -> None:
        """Wraps an iterator; see `Pipeline`."""
        super().__init__(parent)
        self._identity, self._gather = identity, gather
        weakref.finalize(self, parent.close)  # at the latest before Python ends, or its threads would end untidily

    def __next__(self) -> Row:
        """The next batch."""
        batch: Row = next(self._parent)
        return batch

    def get_state(self) -> Position:
        """The position after the last batch, the same on every process; with `gather` all have to ask at once."""
        position = self._parent.get_state()
        if self._gather is not None:
            merged: Position = {}
            for other in self._gather(position):
                merged.update(other)
            position = merged
        # A copy: the iterators go on changing theirs.
        state: Position = json.loads(json.dumps({"data": self._identity, "position": position}))
        return state

    def set_state(self, state: Position) -> None:
        """Go to a position, of any number of processes.

        Raises:
            UsageError: If it is a position in other data.
        """
        found = state.get("data", {}) if isinstance(state, Mapping) else {}
        if found != self._identity:
            names = sorted(n for n in {*found, *self._identity} if found.get(n) != self._identity.get(n))
            raise UsageError(
                f"the position is one in other data ({', '.join(names)} differ); give the same data, or start anew"
            )
        self._parent.set_state(state["position"])


class _Rows:
    """The rows of a layout, for grain: a sequence that makes a row when it is asked for."""

    def __init__(self, corpus: Corpus, layout: Layout, length: int, pad: int) -> None:
        self._of = (corpus, layout)
        self._length, self._pad = length, pad

    def __len__(self) -> int:
        return self._of[1].rows

    def __getitem__(self, index: int) -> Row:
        return packing.make_row(*self._of, int(index), self._length, self._pad)


class _Steps(grain.MapDataset):
    """A process's batch of each step, by the number of the step."""

    def __init__(self, parent: grain.MapDataset, rows: int, config: DataConfig, mine: range, blank: Row) -> None:
        super().__init__(parent)
        self._rows, self._size, self._mine, self._blank = rows, config.batch_size, mine, blank
        padded = config.remainder == "pad" and rows < _ENDLESS
        self.per_epoch = -(-rows // self._size) if padded else rows // self._size
        if not self.per_epoch:
            raise UsageError(
                f"{config.opened[0].label} makes {rows} rows of {config.sequence_length} tokens, and a batch needs "
                f"{self._size}; give more text, shorter rows, a smaller batch, or remainder pad"
            )
        self._total = _ENDLESS if config.epochs is None else config.epochs * self.per_epoch

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, step = divmod(index, self.per_epoch)
        rows = [step * self._size + row for row in self._mine]
        return _stack([self._parent[epoch * self._rows + row] if row < self._rows else self._blank for row in rows])


class _PartSteps(grain.IterDataset):
    """A process's batch of each step, which takes `each` rows of every part."""

    def __init__(self, parts: Mapping[int, grain.IterDataset], each: int, mine: range, prefetch: int) -> None:
        super().__init__(list(parts.values()))
        self._numbers, self._each, self._mine, self._prefetch = list(parts), each, mine, prefetch

    def __iter__(self) -> grain.DatasetIterator:
        parents = [part.__iter__() for part in self.parents]
        return _Ahead(_PartStepsIterator(parents, self._numbers, self._each, self._mine), self._prefetch)


class _Ahead(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's iterator that a thread runs ahead of, but closed only once: twice fails when Python ends."""

    def close(self) -> None:
        if not self._closed:
            super().close()


class _PartStepsIterator(grain.DatasetIterator):
    def __init__(self, parents: list[grain.DatasetIterator], numbers: list[int], each: int, mine: range) -> None:
        super().__init__(parents)
        self._numbers, self._each, self._mine = numbers, each, mine

    def __next__(self) -> Row:
        rows = []
        for number, parent in zip(self._numbers, self._parents, strict=True):
            for row in range(number * self._each, (number + 1) * self._each):
                made = next(parent)  # also where it is another process's
                if row in self._mine:
                    rows.append(made)
        return _stack(rows)

    def get_state(self) -> Position:
        return {str(number): p.get_state() for number, p in zip(self._numbers, self._parents, strict=True)}

    def set_state(self, state: Position) -> None:
        for number, parent in zip(self._numbers, self._parents, strict=True):
            if str(number) not in state:
                raise UsageError(
                    f"the position lacks part {number} of the data; it was not gathered from all processes"
                )
            parent.set_state(state[str(number)])


class _StreamPart(grain.IterDataset):
    """The documents of one part of a stream, over and over."""

    def __init__(self, stream: Stream, part: int, parts: int) -> None:
        super().__init__()
        self._stream, self._which = stream, (part, parts)

    def __iter__(self) -> _StreamPartIterator:
        return _StreamPartIterator(self._stream, self._stream.open_part(*self._which))


class _StreamPartIterator(grain.DatasetIterator):
    def __init__(self, stream: Stream, rows: Any) -> None:
        super().__init__()
        self._stream, self._table, self._rows = stream, rows, iter(rows)
        self._start: Position = rows.state_dict()
        self._read_any = False

    def __next__(self) -> Document:
        row = next(self._rows, None)
        if row is None:
            if not self._read_any:
                raise UsageError(f"{self._stream.label} has a part without rows; give fewer or fuller files")
            self._go(self._start)
            row = next(self._rows)
        self._read_any = True
        return self._stream.read(row)

    def _go(self, position: Position) -> None:
        self._rows.close()
        self._table.load_state_dict(position)
        self._rows = iter(self._table)

    def get_state(self) -> Position:
        return {"rows": self._table.state_dict(), "read_any": self._read_any}

    def set_state(self, state: Position) -> None:
        self._read_any = state["read_any"]
        self._go(state["rows"])

    def close(self) -> None:
        closed = self._closed
        super().close()  # first, because closing the rows may free what closes this again
        if not closed:
            self._rows.close()


class _Each(grain.experimental.FlatMapTransform):
    """Every row of a window by itself."""

    def flat_map(self, element: list[Row]) -> list[Row]:
        return element


def _stream_rows(
    stream: Stream, part: int, parts: int, number: int, tokenizer: Tokenizer, config: DataConfig
) -> grain.IterDataset:
    """Rows of one part of a stream: a window of documents is shuffled, tokenised and packed at once."""

    def window_rows(documents: list[Document], rng: np.random.Generator) -> list[Row]:
        order = rng.permutation(len(documents)) if config.shuffle else range(len(documents))
        corpus = packing.join(tokenise(documents[index], tokenizer, config) for index in order)
        layout = _layout(corpus, config)
        if not layout.rows:
            raise UsageError(
                f"{stream.label} has {len(documents)} documents without anything to predict; check its column, or "
                "raise sequence_length"
            )
        return [
            packing.make_row(corpus, layout, row, config.sequence_length, tokenizer.pad) for row in range(layout.rows)
        ]

    windows = _StreamPart(stream, part, parts).batch(config.window, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(
        windows.random_map(window_rows, seed=_seed(config.seed, number, part)), _Each()
    )


def _table(
    documents: Sequence[Document | TokenDocument], tokenizer: Tokenizer, config: DataConfig, source: SourceConfig
) -> tuple[Corpus, Layout, SourceReport]:
    """All rows of a source that is read whole."""

    def tokenised() -> Iterator[TokenDocument]:
        ends = config.packing == "pack" or len(documents) > 1
        for document in documents:
            yield tokenise(document, tokenizer, config, ends=ends)

    whole = packing.join(tokenised())
    corpus = packing.clip(whole, source.skip_tokens, source.max_tokens)
    layout = _layout(corpus, config)
    total = len(whole.tokens)
    report = SourceReport(
        source.label,
        whole.documents,
        total,
        layout.rows,
        whole.documents - corpus.documents + layout.dropped_documents,
        total - len(corpus.tokens) + layout.dropped_tokens,
    )
    if not layout.rows:
        raise UsageError(
            f"{source.label} has nothing to train on: {report.documents} documents with {total} tokens, of which "
            f"{len(corpus.tokens)} are left after skip_tokens, and none fits a row; give other text or longer rows"
        )
    return corpus, layout, report


def _layout(corpus: Corpus, config: DataConfig) -> Layout:
    if config.packing == "concatenate":
        return packing.concatenate(corpus, config.sequence_length)
    return packing.pack(corpus, config.sequence_length, long=config.long_documents)


def _ordered(rows: _Rows, config: DataConfig, number: int) -> grain.MapDataset:
    """Rows in another order in every epoch, if so configured."""
    dataset = grain.MapDataset.source(rows)
    return dataset.shuffle(seed=_seed(config.seed, number)) if config.shuffle else dataset


def _seed(*numbers: int) -> int:
    # Hashed, because grain counts epochs on top: seeds that are neighbours would share orders.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _stack(rows: Sequence[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _gather_by_jax(position: Position) -> list[Position]:
    """The positions of all processes; every process has to call it."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]
