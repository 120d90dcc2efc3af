"""Generated answers: what of a response is the answer, and whether it is the right one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation

from ngc_jax.evaluation.requests import Response
from ngc_jax.evaluation.specs import Answer

# From an answer and its target, whether each score of that kind of answer is 1.
Judge = Callable[[str, str], Sequence[bool]]

# Digits with commas between thousands, a sign, a decimal part; a dollar sign may be before or after the sign.
_NUMBER = r"-?\$?-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def strict_number(text: str) -> Decimal | None:
    """The number after the first `####`, as GSM8K's answers have it; None if there is none.

    Example:
        >>> strict_number("5 apples cost $1,000.50. #### $1,000.50"), strict_number("1,000")
        (Decimal('1000.50'), None)
    """
    found = _STRICT.search(text)
    return None if found is None else _number(found[1])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none.

    Example:
        >>> last_number("First 3, then -4."), last_number("none")
        (Decimal('-4'), None)
    """
    found = _ANY.findall(text)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """What is judged of a response.

    Attributes:
        text: The answer, without reasoning; None if the response has no end of the reasoning.
        truncated: Whether the response has the longest length and would have continued.
    """

    text: str | None
    truncated: bool

    @classmethod
    def of(cls, response: Response, think_end: str | None, until: Sequence[str]) -> GeneratedAnswer:
        r"""The answer in a response.

        Args:
            response: Text and finish.
            think_end: The tag after which the answer begins; the last one counts. None if there is no reasoning.
            until: Texts before which an answer after reasoning ends.

        Example:
            >>> response = {"text": "<think>1 or 2?</think>2\n\nAnd more", "tokens": 9, "finish": "length"}
            >>> GeneratedAnswer.of(response, "</think>", ["\n\n"])
            GeneratedAnswer(text='2', truncated=False)
        """
        text, truncated = str(response["text"]), response["finish"] == "length"
        if think_end is None:
            return cls(text, truncated)
        _, tag, answer = text.rpartition(think_end)
        if not tag:
            return cls(None, truncated)
        ends = [place for one in until if (place := answer.find(one)) >= 0]
        return cls(answer[: min(ends)], False) if ends else cls(answer, truncated)


@contextmanager
def judging(kind: Answer) -> Iterator[Judge]:
    """A judge of answers of a kind; its scores are `specs.ANSWER_SCORES`.

    Raises:
        UsageError: If the library that compares them is missing.

    Example:
        >>> with judging("number") as judge:
        ...     judge("It is 5. #### 6", "#### 5"), judge("It is 5", "5")
        ((False, False), (False, True))
    """
    if kind == "math":
        from ngc_jax.evaluation.math_answers import MathJudge

        with MathJudge() as verifier:
            yield lambda answer, target: (verifier(answer, target),)
        return
    judges: dict[Answer, Judge] = {
        "text": lambda answer, target: (answer.strip() == target.strip(),),
        "number": lambda answer, target: (
            strict_number(answer) == last_number(target),
            last_number(answer) == last_number(target),
        ),
        "last_number": lambda answer, target: (last_number(answer) == last_number(target),),
    }
    yield judges[kind]
