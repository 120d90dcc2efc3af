"""Mutations of a GGUF header's structure: keys, types, values and lengths of its metadata, and its tensor table."""

from __future__ import annotations

import itertools
import random
import struct
from typing import Any, NamedTuple

from experiments.fuzz.mutate import WEIRD

_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TEXTS = tuple(value for value in WEIRD if isinstance(value, str))
_INTEGERS = (0, 1, 2, 3, 7, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 0.5)


class _Entry(NamedTuple):
    key: bytes
    kind: int
    payload: bytes


def mutate_gguf(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of the metadata or of the tensor table of a valid file; its weights do not change."""
    version, tensors, keys = struct.unpack_from("<IQQ", data, 4)
    position, entries = 24, []
    for _ in range(keys):
        entry, position = _read(data, position)
        entries.append(entry)
    begin = position
    for _ in range(tensors):
        length = struct.unpack_from("<Q", data, position)[0]
        position += 8 + length
        position += 4 + 8 * struct.unpack_from("<I", data, position)[0] + 12
    table, alignment = bytearray(data[begin:position]), 32
    weights = data[-(-position // alignment) * alignment :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.85 and entries:
            _mutate_entry(rng, entries)
        else:
            place = rng.randrange(len(table))
            table[place] = rng.choice((0, 1, 2, 7, 8, 30, 255, table[place] ^ (1 << rng.randrange(8))))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries))
    for entry in entries:
        header += struct.pack("<Q", len(entry.key)) + entry.key + struct.pack("<I", entry.kind) + entry.payload
    header += bytes(table)
    return header + bytes(-len(header) % alignment) + weights


def _read(data: bytes, position: int) -> tuple[_Entry, int]:
    length = struct.unpack_from("<Q", data, position)[0]
    key = data[position + 8 : position + 8 + length]
    position += 8 + length
    kind = struct.unpack_from("<I", data, position)[0]
    end = _end(data, position + 4, kind)
    return _Entry(key, kind, data[position + 4 : end]), end


def _end(data: bytes, position: int, kind: int) -> int:
    """The end of a value that begins at a position."""
    if kind == _STRING:
        return position + 8 + int(struct.unpack_from("<Q", data, position)[0])
    if kind != _ARRAY:
        return position + struct.calcsize(f"<{_SIZES[kind]}")
    item, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if item in _SIZES:
        return position + int(length) * struct.calcsize(f"<{_SIZES[item]}")
    for _ in range(length):
        position = _end(data, position, item)
    return position


def _mutate_entry(rng: random.Random, entries: list[_Entry]) -> None:
    place = rng.randrange(len(entries))
    old = entries[place]
    kind = rng.randrange(6)
    if kind == 0:
        del entries[place]
    elif kind == 1:
        entries.insert(place, old if rng.random() < 0.3 else old._replace(key=old.key + b"x"))
    elif kind == 2:
        other = rng.choice(entries)
        entries[place] = old._replace(kind=other.kind, payload=other.payload)
    elif kind == 3 and old.kind == _ARRAY:
        entries[place] = old._replace(payload=_other_array(rng, old.payload))
    elif kind == 4 and old.kind in _SIZES:
        entries[place] = old._replace(payload=_scalar(rng, old.kind))
    else:
        new = rng.choice((*_SIZES, _STRING, _STRING, _ARRAY))
        entries[place] = old._replace(kind=new, payload=_value(rng, new))


def _other_array(rng: random.Random, payload: bytes) -> bytes:
    """An array with one item fewer, one more, or one changed."""
    item, length = struct.unpack_from("<IQ", payload)
    ends = [12]
    for _ in range(length):
        ends.append(_end(payload, ends[-1], item))
    if not length:
        return _value(rng, _ARRAY)
    items = [payload[begin:end] for begin, end in itertools.pairwise(ends)]
    place, action = rng.randrange(length), rng.randrange(3)
    if action == 0:
        del items[place]
    elif action == 1:
        items.insert(place, items[rng.randrange(length)])
    else:
        items[place] = _value(rng, item)
    return struct.pack("<IQ", item, len(items)) + b"".join(items)


def _value(rng: random.Random, kind: int) -> bytes:
    if kind == _STRING:
        text = rng.choice((*_TEXTS, "\udcff")).encode(errors="surrogateescape")
        return struct.pack("<Q", len(text)) + text
    if kind == _ARRAY:
        item, length = rng.choice((*_SIZES, _STRING)), rng.choice((0, 1, 3))
        return struct.pack("<IQ", item, length) + b"".join(_value(rng, item) for _ in range(length))
    return _scalar(rng, kind)


def _scalar(rng: random.Random, kind: int) -> bytes:
    code = _SIZES[kind]
    value: Any = rng.choice(_FLOATS) if code in "fd" else rng.choice(_INTEGERS)
    if code in "fd":
        return struct.pack(f"<{code}", value)
    size = struct.calcsize(f"<{code}")
    return int(value).to_bytes(8, "little")[:size]
