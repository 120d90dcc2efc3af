"""The examples of a page of docs/ run, top to bottom, in one session."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of lines before it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


def run_examples(page: str, *, least: int) -> dict[str, Any]:
    """Run all blocks, at least the given number of them; returns the session."""
    blocks = python_blocks(page)
    assert len(blocks) >= least
    session: dict[str, Any] = {}
    for line, code in blocks:
        # Empty lines before the code make the traceback's line the page's line.
        exec(compile("\n" * line + code, str(DOCS / page), "exec"), session)
    return session
