"""Mutations of bytes, JSON and text; each a pure function of a random generator and its input."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

WEIRD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", " ", "x", "\u202e", "\0", "é" * 50, "x" * 5000, "[/INST]", "../outside",
    "{{ 1/0 }}", "{% for i in range(9) %}{{ i }}{% endfor %}", [], {}, [[]], [None], [1, "a"], {"": None},
    {"a": {"b": []}},
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, upto: int | None = None, *, same_length: bool = False) -> bytes:
    """One to four changes: bits flipped, bytes replaced, cut out, repeated, or cut off; in the first `upto` bytes.

    With `same_length` the rest keeps its position, so that a reader gets further.
    """
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(len(found), upto or len(found))
        if end < 2:
            break
        start = rng.randrange(end)
        length = rng.choice((1, 1, 1, 2, 4, 8, rng.randrange(1, 200)))
        kind = rng.choice((0, 1, 4)) if same_length else rng.randrange(6)
        length = min(length, end - start)
        if kind == 0:
            found[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[start : start + length] = bytes(rng.randrange(256) for _ in range(length))
        elif kind == 2:
            del found[start : start + length]
        elif kind == 3:
            found[start:start] = found[start : start + length]
        elif kind == 4:
            found[start : start + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f\0\0\0\0"))
        else:
            del found[start:]
    return bytes(found)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """One to three changes of a value's structure: replaced, removed, doubled, renamed, wrapped, or exchanged."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(found))
        if not places:
            return rng.choice(WEIRD)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(WEIRD))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, place = rng.choice(places)
            try:
                holder[key] = copy.deepcopy(other[place])
            except (KeyError, IndexError):
                holder[key] = None
        elif kind == 5:
            holder[key] = [holder[key]] * rng.choice((1, 2, 50))
        elif kind == 6 and isinstance(holder, dict):
            holder[f"{key}{rng.choice(('x', ' ', '.', ''))}"] = holder.pop(key)
        else:
            old = holder[key]
            number = isinstance(old, int | float) and not isinstance(old, bool)
            holder[key] = _nearby(rng, old) if number else str(old)[: rng.randrange(1, 40)]
    return found


def mutate_text(rng: random.Random, text: str) -> str:
    """One to four changes of characters; sometimes very deep nesting."""
    if rng.random() < 0.02:
        return rng.choice("[{(") * rng.choice((50, 5000)) + text
    found = list(text)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            found.insert(place, rng.choice("qkvougd-:;=0123456789 \t\n!&*?|>%@`\"'[]{},#é\u0000\u2028"))
        elif kind == 1 and found:
            del found[place - 1]
        elif kind == 2 and found:
            found[place - 1] = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x3000))))
        elif kind == 3:
            end = rng.randrange(place, len(found) + 1)
            found[place:place] = found[place:end] * rng.choice((1, 2, 20))
        else:
            del found[place : place + rng.randrange(1, 30)]
    return "".join(found)


def dump(rng: random.Random, value: Any) -> bytes:
    """JSON text of a value; sometimes its bytes are mutated too."""
    data = json.dumps(value).encode()
    chance = rng.random()
    if chance < 0.03:
        data = _nested(rng, value)
    elif chance < 0.06:
        data = _doubled(rng, value)
    return mutate_bytes(rng, data) if rng.random() < 0.15 else data


def _nested(rng: random.Random, value: Any) -> bytes:
    """Valid JSON text with a value that is nested deeper than any reader's stack."""
    depth = rng.choice((60, 2_000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return _spliced(rng, value, opening * depth + "1" + closing * depth)


def _doubled(rng: random.Random, value: Any) -> bytes:
    """JSON text with a duplicate key, whose second value differs."""
    text = json.dumps(value)
    if not isinstance(value, dict) or not value:
        return text.encode()
    key, other = rng.choice(list(value)), rng.choice(WEIRD)
    return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(other)}}}".encode()


def _spliced(rng: random.Random, value: Any, text: str) -> bytes:
    """JSON text of a value in which one part is replaced by a text."""
    found = copy.deepcopy(value)
    places = list(_places(found))
    if not places:
        return text.encode()
    holder, key = rng.choice(places)
    holder[key] = "@HERE@"
    return json.dumps(found).replace('"@HERE@"', text).encode()


def _nearby(rng: random.Random, number: float) -> float:
    return rng.choice((number + 1, number - 1, -number, number * 2, number / 2, number * 10**6, number % 3))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a nested value that can be changed."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        # A few places of a long list, such as a vocabulary, are enough.
        for key in list(keys)[:40]:
            found.append((holder, key))
            waiting.append(holder[key])
    return found
