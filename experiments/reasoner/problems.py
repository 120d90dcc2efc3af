"""Multi-step arithmetic with written working: problems, a tokenizer for them, and endless batches.

A problem is one line, for example `58+67-9+40=58+67=25;25-9=16;16+40=56;#56`: a chain of additions and subtractions
modulo 100, then one step of working after the other, then the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ngc_jax.models.tokenizer import Tokenizer, wrap

ALPHABET = "0123456789+-=;#\n"
_ID = {character: index for index, character in enumerate(ALPHABET)}
END = _ID["\n"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A chain of operations.

    Attributes:
        prompt: The chain and an equals sign.
        working: Every step, and the answer after `#`, and the end of the line.
        answer: The last number.
    """

    prompt: str
    working: str
    answer: int


def make_problem(rng: np.random.Generator, steps: int, operands: int = 100) -> Problem:
    """Draw a problem.

    Args:
        rng: Randomness.
        steps: Operations in the chain.
        operands: Upper limit of the added or subtracted numbers, exclusive.
    """
    start = int(rng.integers(100))
    return solve(start, [("+-"[rng.integers(2)], int(rng.integers(operands))) for _ in range(steps)])


def solve(start: int, operations: Sequence[tuple[str, int]]) -> Problem:
    """The problem of a chain.

    Args:
        start: Its first number, below 100.
        operations: Pairs of a sign and a number.
    """
    value = start
    chain, working = str(value), []
    for sign, operand in operations:
        chain += f"{sign}{operand}"
        result = (value + operand if sign == "+" else value - operand) % 100
        working.append(f"{value}{sign}{operand}={result};")
        value = result
    return Problem(f"{chain}=", "".join(working) + f"#{value}\n", value)


def encode(text: str) -> list[int]:
    """Token ids, one for every character."""
    return [_ID[character] for character in text]


def make_tokenizer() -> Tokenizer:
    """The same as `encode`, in the form in which models are saved."""
    backend = Backend(models.WordLevel(dict(_ID), unk_token="#"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return wrap(backend, special_tokens={"eos_token": "\n"})


def make_rows(
    rng: np.random.Generator, rows: int, length: int, steps: int, operands: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of concatenated problems, the last of a row cut short.

    Args:
        rng: Randomness.
        rows: B.
        length: L.
        steps: Operations in a problem.
        operands: Upper limit of the added or subtracted numbers, exclusive.

    Returns:
        Tokens (B, L) int32, and weights (B, L) float32: 1 for working and answers, which can be predicted.
    """
    tokens, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    for row in range(rows):
        ids: list[int] = []
        counted: list[int] = []
        while len(ids) < length:
            problem = make_problem(rng, steps, operands)
            ids += encode(problem.prompt + problem.working)
            counted += [0] * len(problem.prompt) + [1] * len(problem.working)
        tokens[row], weights[row] = ids[:length], counted[:length]
    return tokens, weights


class ProblemBatches:
    """An endless stream of new problems; the position is the number of batches taken."""

    def __init__(self, seed: int, *, rows: int, length: int, steps: int, operands: int = 100) -> None:
        """Settings as for `make_rows`; every batch has its own randomness, from the seed and its number."""
        self._seed, self._shape, self._taken = seed, (rows, length, steps, operands), 0

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Tokens, positions, starts and weights, each (B, L)."""
        tokens, weights = make_rows(np.random.default_rng([self._seed, self._taken]), *self._shape)
        self._taken += 1
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy()
        return {"tokens": tokens, "positions": positions, "starts": np.zeros_like(tokens), "weights": weights}

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"batches": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._taken = int(state["batches"])
