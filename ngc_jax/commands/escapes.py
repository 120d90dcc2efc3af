"""Escape control characters in output: a terminal obeys them, and a model's text or a file's name may contain any."""

from __future__ import annotations

import re

# All of Unicode's category Cc except the line break and the tabulator.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_controls(text: str) -> str:
    r"""Show control characters as escapes, except line breaks and tabulators.

    >>> escape_controls("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
