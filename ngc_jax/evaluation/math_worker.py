"""The process in which `math_answers.MathJudge` compares mathematical answers: JSON lines in, JSON lines out.

It imports nothing of JAX. What takes too long, or too much memory, costs this process and not the evaluation.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from contextlib import suppress
from typing import Any

# Of a comparison: sympy can be made to compute numbers that fill any memory.
_MEMORY = 4 * 2**30


def main() -> int:
    """Answer {"answer", "target"} with {"right"}, line by line, until standard input ends.

    The first line says that the library is there, or which package is missing.
    """
    # Libraries print to standard output what would break the protocol.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _limit(resource.RLIMIT_AS, _MEMORY)
    logging.disable(logging.CRITICAL)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        import math_verify
    except ModuleNotFoundError as error:
        reply(missing=error.name)
        return 1
    reply(ready=math_verify.__name__)
    for line in sys.stdin:
        asked = json.loads(line)
        # A parent that was killed stops nothing: the processor's time is limited here.
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + asked["seconds"]) + 2)
        try:
            reply(right=_is_right(asked["answer"], asked["target"]))
        except (Exception, MemoryError, RecursionError):  # sympy raises errors of many kinds
            reply(right=False)
    return 0


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    with suppress(OSError, ValueError):  # not every system has every limit
        resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _is_right(answer: str, target: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, LatexNormalizationConfig, parse, verify

    # A box counts before the words "final answer"; what is in neither, if it is the last expression of the text. Of
    # several boxes the last counts, with those close before it ("$x = 1$ or $x = 2$"); by default it would be all.
    last = LatexNormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="last")
    forms = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=last), ExprExtractionConfig()]
    # The time limit is the parent's: the library's own works by signals, which need the main thread of a process.
    boxed = target if "\\boxed" in target else f"\\boxed{{{target}}}"
    wanted = parse(boxed, extraction_config=forms, parsing_timeout=None)
    found = parse(answer, extraction_config=forms, parsing_timeout=None)
    return bool(verify(wanted, found, timeout_seconds=None))


if __name__ == "__main__":
    sys.exit(main())
