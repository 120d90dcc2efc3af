"""From sources to batches: tokens, rows, order, distribution over processes, and a position to continue from.

Sources that are read whole become rows once, and every step is determined by its number: its rows, their order, and the
process of each. So the position is a number, the same on every process and for any number of processes. With a stream
among the sources the rows of a step come from a fixed number of parts, and the position says where each part is.
"""

from __future__ import annotations

import json
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import gcd
from typing import Any

import grain
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import check_ids
from ngc_jax.training import packing
from ngc_jax.training.data_config import DataConfig, prefix_of, tokenise
from ngc_jax.training.packing import Corpus, Layout, Row, TokenDocument
from ngc_jax.training.sources import Document, SourceConfig, Stream, open_source
from ngc_jax.training.stream_parts import Each, PartSteps, Position, StreamPart, stack

__all__ = ["DataConfig", "Pipeline", "PipelineIterator", "SourceReport", "make_pipeline"]

Gather = Callable[[Position], Sequence[Position]]
_ENDLESS = sys.maxsize
_FREE = ("epochs", "prefetch")  # may change in a continued run


@dataclass(frozen=True)
class SourceReport:
    """Counts of documents, tokens and rows of a source that was read whole; unknown for a stream.

    Attributes:
        name: The source's.
        documents: Documents with any text.
        tokens: Their tokens, including those left out.
        rows: Rows made of them.
        dropped_documents: Documents with no token in a row.
        dropped_tokens: Tokens in no row.
    """

    name: str
    documents: int
    tokens: int
    rows: int
    dropped_documents: int
    dropped_tokens: int


def make_pipeline(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
    given: Mapping[str, Sequence[Document | TokenDocument]] | None = None,
    gather: Gather | None = None,
) -> Pipeline:
    """Open the sources and make a dataset of batches.

    The batches of all processes, concatenated in the order of the processes, are the batches that a single process
    would have.

    Args:
        config: What to train on.
        tokenizer: The model's.
        process_index: Index of this process.
        process_count: Number of processes.
        vocab_size: The model's: token ids beyond it are refused. Unlimited if None.
        given: Documents made elsewhere, by their name in `config.sources`.
        gather: Returns the positions of all processes from that of this one; only used with streams and several
            processes. By default jax gathers them.

    Returns:
        A grain dataset of batches: dicts of arrays (batch_size / process_count, sequence_length), see `packing`.

    Raises:
        UsageError: If a source cannot be used or is too small, or the number of processes does not divide the batch.
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
    prefix = prefix_of(tokenizer, config)
    identity["begin_token"] = bool(prefix)
    identity["sources"] = []
    for number, (source, documents) in enumerate(zip(config.opened, opened, strict=True)):
        if isinstance(documents, Stream):
            parts = gcd(parts, documents.shards)
            identity["sources"].append(f"{source.weight} of a stream of {documents.shards} files")
            continue
        corpus, layout, report = _table(documents, tokenizer, config, source)
        if vocab_size is not None:
            check_ids(corpus.tokens, vocab_size)
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
        total = None if config.epochs is None else len(steps)
        return Pipeline(steps.to_iter_dataset(options), identity, reports, per_epoch, None, total)

    def rows_of(number: int, part: int) -> grain.IterDataset:
        documents = opened[number]
        if isinstance(documents, Stream):
            return _stream_rows(documents, part, parts, number, tokenizer, config, vocab_size)
        return tables[number].repeat()[part::parts].to_iter_dataset(grain.ReadOptions(0, 0))

    identity["parts"] = parts
    each = config.batch_size // parts
    mixtures = {}
    for part in sorted({row // each for row in mine}):
        sources = [rows_of(number, part) for number in range(len(opened))]
        mixtures[part] = sources[0] if len(sources) == 1 else grain.IterDataset.mix(sources, weights)
    if gather is None and process_count > 1:
        gather = _gather_by_jax
    batches = PartSteps(mixtures, each, mine, config.prefetch)
    return Pipeline(batches, identity, reports, None, gather if process_count > 1 else None)


class Pipeline(grain.IterDataset):
    """Batches of one process; its `iter` has `get_state` and `set_state`.

    Attributes:
        reports: Counts of the sources that were read whole.
        steps_per_epoch: Batches of an epoch, the same on every process; None with several sources or a stream.
        steps: Total number of batches; None if they do not end.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        identity: dict[str, Any],
        reports: Sequence[SourceReport],
        steps_per_epoch: int | None,
        gather: Gather | None,
        steps: int | None = None,
    ) -> None:
        """Wraps batches; see `make_pipeline`."""
        super().__init__(batches)
        self.reports, self.steps_per_epoch, self.steps = tuple(reports), steps_per_epoch, steps
        self._identity, self._gather = identity, gather

    def __iter__(self) -> PipelineIterator:
        return PipelineIterator(self._parent.__iter__(), self._identity, self._gather)


class PipelineIterator(grain.DatasetIterator):
    """Batches, and a position in them that is plain JSON."""

    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, Any], gather: Gather | None) -> None:
        """Wraps an iterator; see `Pipeline`."""
        super().__init__(parent)
        self._identity, self._gather = identity, gather
        weakref.finalize(self, parent.close)  # at the latest before Python exits, so that its threads end cleanly

    def __next__(self) -> Row:
        """The next batch."""
        batch: Row = next(self._parent)
        return batch

    def get_state(self) -> Position:
        """The position after the last batch, the same on every process; with `gather` all must ask at the same time."""
        position = self._parent.get_state()
        if self._gather is not None:
            merged: Position = {}
            for other in self._gather(position):
                merged.update(other)
            position = merged
        # A copy: the iterators continue to change theirs.
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
                f"the position is in other data ({', '.join(names)} differ); give the same data, or start again"
            )
        self._parent.set_state(state["position"])


class _Rows:
    """The rows of a layout as a sequence for grain; a row is made when it is requested."""

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
                f"{config.opened[0].label} makes {rows} rows of {config.sequence_length} tokens, but a batch needs "
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
        return stack([self._parent[epoch * self._rows + row] if row < self._rows else self._blank for row in rows])


def _stream_rows(
    stream: Stream,
    part: int,
    parts: int,
    number: int,
    tokenizer: Tokenizer,
    config: DataConfig,
    vocab_size: int | None,
) -> grain.IterDataset:
    """Rows of one part of a stream: a window of documents is shuffled, tokenised and packed together."""

    def window_rows(documents: list[Document], rng: np.random.Generator) -> list[Row]:
        order = rng.permutation(len(documents)) if config.shuffle else range(len(documents))
        whole = packing.join(tokenise(documents[index], tokenizer, config) for index in order)
        if vocab_size is not None:
            check_ids(whole.tokens, vocab_size)
        corpus = _begun(whole, tokenizer, config)
        layout = _layout(corpus, config)
        if not layout.rows:
            raise UsageError(
                f"{stream.label} has {len(documents)} documents without anything to predict; check its column, or "
                "raise sequence_length"
            )
        return [
            packing.make_row(corpus, layout, row, config.sequence_length, tokenizer.pad) for row in range(layout.rows)
        ]

    windows = StreamPart(stream, part, parts).batch(config.window, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(
        windows.random_map(window_rows, seed=_seed(config.seed, number, part)), Each()
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
    clipped = packing.clip(whole, source.skip_tokens, source.max_tokens)
    corpus = _begun(clipped, tokenizer, config)
    layout = _layout(corpus, config)
    total = len(whole.tokens)
    report = SourceReport(
        source.label,
        whole.documents,
        total,
        layout.rows,
        whole.documents - clipped.documents + layout.dropped_documents,
        total - len(clipped.tokens) + layout.dropped_tokens,
    )
    if not layout.rows:
        raise UsageError(
            f"{source.label} has nothing to train on: {report.documents} documents with {total} tokens, of which "
            f"{len(clipped.tokens)} are left after skip_tokens, and none fits a row; give other text or longer rows"
        )
    return corpus, layout, report


def _begun(corpus: Corpus, tokenizer: Tokenizer, config: DataConfig) -> Corpus:
    concatenated = config.packing == "concatenate"
    length = config.sequence_length if concatenated else None
    return packing.begin_pieces(corpus, prefix_of(tokenizer, config), length)


def _layout(corpus: Corpus, config: DataConfig) -> Layout:
    if config.packing == "concatenate":
        return packing.concatenate(corpus, config.sequence_length)
    return packing.pack(corpus, config.sequence_length, long=config.long_documents)


def _ordered(rows: _Rows, config: DataConfig, number: int) -> grain.MapDataset:
    """Rows in a different order in every epoch, if configured."""
    dataset = grain.MapDataset.source(rows)
    return dataset.shuffle(seed=_seed(config.seed, number)) if config.shuffle else dataset


def _seed(*numbers: int) -> int:
    # Hashed, because grain adds the epoch: neighbouring seeds would share orders.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _gather_by_jax(position: Position) -> list[Position]:
    """The positions of all processes; every process must call it."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]
