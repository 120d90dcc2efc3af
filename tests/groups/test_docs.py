"""The examples of docs/groups.md run, top to bottom, in one session; their assertions hold."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "groups.md"


def test_the_examples_run():
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 8
    session = {}
    for block in blocks:
        # Empty lines before the code make the traceback's line the page's line.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), session)
    # Printed on failure only: how far from the limits the examples are.
    for name, kernel, states in [
        ("lifted", session["lifted"], session["fitted"]),
        ("bilinear", session["kernel"], session["best_bilinear"](21)),
    ]:
        print(name, float(session["error"](kernel, states)))
    print("driven", float(session["distance"](session["driven"])), float(session["distance"](session["u"])))
