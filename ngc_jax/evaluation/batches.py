"""Distribute likelihood requests over batches of few shapes: plain Python, nothing is computed yet.

Every shape is a program to compile, and every row is padded to its batch's shape. Classes of like lengths are merged as
long as the padding costs less than another program would.

Legend: P tokens of a shared prefix, Q contexts of a batch, L tokens of a context after the prefix, R continuations, T
tokens of a continuation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.requests import LikelihoodRequest
from ngc_jax.models.generate import bucket

# Continuations of one context in one batch, for each context that the batch has room for.
_CHOICES = 4
# Fewest tokens that are read of continuations: a single one would be written into the cache before it is attended to.
_FEWEST = 8
# Fewest tokens of a prefix that is read once for all contexts that begin with it.
_SHORTEST_PREFIX = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a batch.

    Attributes:
        contexts: Q.
        length: L.
        rows: R.
        width: T; 1 if every continuation is one token, so that none has to be read.
    """

    contexts: int
    length: int
    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, with padding."""
        return self.contexts * self.length + self.rows * (self.width - 1)


class LikelihoodBatch(NamedTuple):
    """Requests that are answered at once.

    Attributes:
        shape: Its sizes.
        prefix: (P,) tokens with which all contexts begin; none if it does not pay to share them.
        requests: The requests.
    """

    shape: Shape
    prefix: tuple[int, ...]
    requests: tuple[LikelihoodRequest, ...]


class _Unit(NamedTuple):
    """A context, and the requests for what follows it."""

    context: tuple[int, ...]
    requests: list[LikelihoodRequest]

    @property
    def width(self) -> int:
        """The T of a batch of this alone."""
        longest = max(len(request.continuation) for request in self.requests)
        return 1 if longest == 1 else 1 + bucket(longest - 1, smallest=_FEWEST)  # the last token is not read


def context_room(request: LikelihoodRequest, limit: int) -> int:
    """Most tokens of a request's context: the last token of the continuation is predicted, and never read.

    Raises:
        UsageError: If the continuation alone is too long.
    """
    room = limit + 1 - len(request.continuation)
    if room < 1:
        raise UsageError(
            f"request {request.id} has {len(request.continuation)} tokens to score, and the model is for {limit}; "
            "shorten the choice"
        )
    return room


def cut_context(request: LikelihoodRequest, limit: int) -> tuple[int, ...]:
    """The last tokens of a request's context that the model has room for."""
    return tuple(int(token) for token in request.context[-context_room(request, limit) :])


def likelihood_batches(
    requests: Sequence[LikelihoodRequest], batch_size: int, limit: int, *, compiling: float
) -> Iterator[LikelihoodBatch]:
    """Batches of all requests; those with the same context are in one batch where they fit.

    Args:
        requests: The requests.
        batch_size: Most contexts of a batch.
        limit: Most tokens that the model reads at once.
        compiling: What compiling a program costs, as the number of tokens that are read in that time.

    Raises:
        UsageError: If a continuation alone is too long.
    """
    for prefix, group in _by_prefix(_units(requests, limit, _CHOICES * batch_size), compiling):
        for units in _classes(group, len(prefix), batch_size, compiling):
            shape = _shape(units, len(prefix), batch_size)
            for some in _fill(units, shape):
                yield LikelihoodBatch(shape, prefix, some)


def _units(requests: Sequence[LikelihoodRequest], limit: int, most: int) -> list[_Unit]:
    """Requests by their contexts, at most `most` in one unit."""
    found: dict[tuple[int, ...], list[_Unit]] = {}
    for request in requests:
        context = cut_context(request, limit)
        units = found.setdefault(context, [])
        if not units or len(units[-1].requests) == most:
            units.append(_Unit(context, []))
        units[-1].requests.append(request)
    return [unit for units in found.values() for unit in units]


def _by_prefix(units: list[_Unit], compiling: float) -> Iterator[tuple[tuple[int, ...], list[_Unit]]]:
    """Units by the prefix that they share, such as solved examples, if it saves more than two programs cost."""
    groups: dict[tuple[int, ...], list[_Unit]] = {}
    for unit in units:
        begin = unit.context[:_SHORTEST_PREFIX] if len(unit.context) > _SHORTEST_PREFIX else ()
        groups.setdefault(begin, []).append(unit)
    alone = groups.pop((), [])
    for group in groups.values():
        contexts = [unit.context for unit in group]
        length = _round_down(min(_common(contexts), min(map(len, contexts)) - 1))
        if (len(group) - 1) * length > 2 * compiling:
            yield contexts[0][:length], group
        else:
            alone += group
    if alone:
        yield (), alone


def _common(contexts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all contexts begin: those that the first and the last in their order share."""
    first, last = min(contexts), max(contexts)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(1 for _ in shared)


def _round_down(length: int) -> int:
    """The greatest length up to this, at least 16, that `bucket` keeps: prefixes of several tasks have few shapes."""
    return next(size for size in range(length, 0, -1) if bucket(size) == size)


def _classes(units: list[_Unit], before: int, batch_size: int, compiling: float) -> list[list[_Unit]]:
    """Units that share a shape: classes of like lengths, the cheapest neighbours merged while that saves time."""
    by_size: dict[tuple[int, int], list[_Unit]] = {}
    for unit in units:
        by_size.setdefault((bucket(len(unit.context) - before), unit.width), []).append(unit)
    classes = [by_size[size] for size in sorted(by_size)]

    def cost(units: list[_Unit]) -> int:
        shape = _shape(units, before, batch_size)
        return -(-len(units) // shape.contexts) * shape.tokens

    costs = list(map(cost, classes))
    merged = [cost(first + second) for first, second in itertools.pairwise(classes)]
    while merged:
        place = min(range(len(merged)), key=lambda at: merged[at] - costs[at] - costs[at + 1])
        if merged[place] - costs[place] - costs[place + 1] > compiling:
            break
        classes[place : place + 2] = [classes[place] + classes[place + 1]]
        costs[place : place + 2] = [merged.pop(place)]
        for at in (place - 1, place):
            if 0 <= at < len(merged):
                merged[at] = cost(classes[at] + classes[at + 1])
    return classes


def _shape(units: list[_Unit], before: int, batch_size: int) -> Shape:
    rows = sum(len(unit.requests) for unit in units)
    contexts = min(batch_size, len(units))
    return Shape(
        contexts,
        bucket(max(len(unit.context) for unit in units) - before),
        max(contexts * -(-rows // len(units)), max(len(unit.requests) for unit in units)),
        max(unit.width for unit in units),
    )


def _fill(units: list[_Unit], shape: Shape) -> Iterator[tuple[LikelihoodRequest, ...]]:
    """The requests of one batch after the other."""
    some: list[LikelihoodRequest] = []
    contexts = 0
    for unit in units:
        if contexts == shape.contexts or len(some) + len(unit.requests) > shape.rows:
            yield tuple(some)
            some, contexts = [], 0
        some += unit.requests
        contexts += 1
    yield tuple(some)
