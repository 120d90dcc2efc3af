"""The examples of docs/stability.md run, top to bottom, in one session; their assertions hold."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "stability.md"


def test_the_examples_run():
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 10
    session = {}
    for block in blocks:
        # Empty lines before the code make the traceback's line the page's line.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), session)
