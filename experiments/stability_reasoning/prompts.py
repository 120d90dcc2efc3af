"""Prompts in matched pairs: one needs steps, the other states its answer."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from experiments.reasoner.problems import Problem, solve

NAMES = "Anna Ben Carl Emma Frank Grace Henry Jack Kate Laura Mark Nina Oscar Paul Rosa Sam Tom Vera".split()  # noqa: SIM905
THINGS = "apples books stones coins cards pens shells eggs stamps bottles oranges buttons".split()  # noqa: SIM905
STORIES = (
    "{A} has {a} {things}. {B} gives {A} {b} {things}. {C} gives {A} {c} {things}.",
    "{A} owns {a} {things}. Then {B} brings {A} {b} {things}. Later {C} brings {A} {c} {things}.",
    "In the morning {A} has {a} {things}. {A} finds {b} {things} with {B}. {A} buys {c} {things} from {C}.",
)
# One question whose answer takes two additions, and one whose answer is the first number of the story.
QUESTIONS = (
    ("How many {things} does {A} have at the end?", "How many {things} does {A} have at the start?"),
    ("How many {things} does {A} have in all?", "How many {things} does {A} have at first?"),
    ("What is the number of {things} after both changes?", "What is the number of {things} before both changes?"),
    ("How many {things} does {A} have last?", "How many {things} does {A} have first?"),
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two prompts about one story.

    Attributes:
        steps: The one that needs two additions.
        stated: The one whose answer the story states.
        answers: The answers of both.
    """

    steps: str
    stated: str
    answers: tuple[int, int]


def make_pairs(seed: int, count: int) -> list[Pair]:
    """Stories with two questions each, from a seed. The question comes first, so that the story is read in its light.

    Args:
        seed: Of all random draws.
        count: Number of pairs, all different.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        a, b, c = (int(number) for number in rng.choice(np.arange(3, 40), 3, replace=False))
        names = [NAMES[index] for index in rng.choice(len(NAMES), 3, replace=False)]
        told = {"A": names[0], "B": names[1], "C": names[2], "a": a, "b": b, "c": c}
        told["things"] = THINGS[rng.integers(len(THINGS))]
        story = STORIES[rng.integers(len(STORIES))].format(**told)
        asked = [question.format(**told) for question in QUESTIONS[rng.integers(len(QUESTIONS))]]
        steps, stated = (f"Question: {one} Answer with one number.\nStory: {story}" for one in asked)
        pairs[steps] = Pair(steps, stated, (a + b + c, a))
    return list(pairs.values())


def make_sums() -> list[tuple[str, int]]:
    """All sums of two digits from 2 to 9 as questions, with their answers: a very small model solves about half."""
    return [(f"What is {a} + {b}?", a + b) for a in range(2, 10) for b in range(2, 10)]


def last_number(text: str) -> int | None:
    """The last whole number in a reply; None if there is none."""
    found = re.findall(r"\d+", text.replace(",", ""))
    return int(found[-1]) if found else None


def make_chains(seed: int, count: int, steps: int) -> list[tuple[Problem, Problem]]:
    """Pairs of sums of equal length for the small model: with one-digit operands, and with zeros in their place.

    Args:
        seed: Of all random draws.
        count: Number of pairs, all different.
        steps: Operations in a chain.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, tuple[Problem, Problem]] = {}
    while len(pairs) < count:
        start = int(rng.integers(100))
        signs = ["+-"[index] for index in rng.integers(0, 2, steps)]
        operands = [int(number) for number in rng.integers(1, 10, steps)]
        hard = solve(start, list(zip(signs, operands, strict=True)))
        pairs[hard.prompt] = (hard, solve(start, [(sign, 0) for sign in signs]))
    return list(pairs.values())


def common_suffix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens that two prompts have in common at their ends."""
    length = min(len(one), len(other))
    same = one[len(one) - length :][::-1] == other[len(other) - length :][::-1]
    return length if same.all() else int(np.argmin(same))
