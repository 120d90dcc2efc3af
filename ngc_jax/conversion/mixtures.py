"""Calibration on several texts together: token shares, mixed window by window.

A mixture is a list of `NAME:SHARE`, such as `["book.txt:0.5", "answers.jsonl:0.5"]`. NAME is a text as for
`ngc_jax.text.read_text`, or JSON Lines (`.jsonl`, or a dataset of the hub without a column), whose rows have one of

- `messages`, a conversation, rendered by the tokenizer's chat template;
- `prompt` and `response`, a conversation of two turns, rendered likewise;
- `text`, read as it is; rows are joined by newlines.

The first of these that the first row has is that of all rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ngc_jax.conversion.text_rows import Rows, fields_of, read_tokens
from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.models.tokenizer import Tokenizer

_NAMED = re.compile(r"(.+):(\d*\.?\d+(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Source:
    """A text of a mixture.

    Attributes:
        name: As for `ngc_jax.text.read_text`, or JSON Lines.
        share: Its share of the tokens, above 0 and at most 1.
    """

    name: str
    share: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The tokens of a mixture.

    Attributes:
        tokens: (T,) int32, one stream without the prefixes of windows.
        sources: The texts.
        counts: Tokens of each.
        rows: The fields that its rows were read by; None for a text without rows.
    """

    tokens: np.ndarray
    sources: tuple[Source, ...]
    counts: tuple[int, ...]
    rows: tuple[Rows | None, ...]

    def describe(self) -> str:
        """What it is made of, in words."""
        parts = (
            f"{count:,} of {source.name}" + ("" if rows is None else f" (rows by {rows})")
            for source, count, rows in zip(self.sources, self.counts, self.rows, strict=True)
        )
        return f"{len(self.tokens):,} tokens: {', '.join(parts)}"


def sources_of(text: str | Sequence[str]) -> tuple[Source, ...]:
    """The texts of a mixture; none for a single text without a share, which is read as it is.

    What follows the last colon is the share. A single text is one without a share if there is a file of the whole name,
    or it is a dataset of the hub.

    Raises:
        UsageError: If a share is missing, out of range or given to a text that has none; if a text is given twice; or
            if the shares do not add up to 1.

    Example:
        >>> sources_of(["book.txt:0.75", "answers.jsonl:0.25"])
        (Source(name='book.txt', share=0.75), Source(name='answers.jsonl', share=0.25))
        >>> sources_of("pydoc:first-half")
        ()
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UsageError(f"the texts are {texts}; expected a text, or a list of NAME:SHARE such as book.txt:0.5")
    if len(texts) == 1 and (texts[0].startswith("hub:") or _is_file(texts[0]) or not _NAMED.fullmatch(texts[0])):
        return ()
    sources = tuple(map(_source, texts))
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the text {twice[0]} is given twice; give it once, with the sum of its shares")
    total = sum(source.share for source in sources)
    if abs(total - 1) > 1e-6:
        raise UsageError(f"the shares of {', '.join(names)} add up to {total:g}; expected 1")
    return sources


def text_label(text: str | Sequence[str]) -> str:
    """A short name of a text or mixture, for tables and for what is stored with a model.

    Example:
        >>> text_label("texts/book.txt"), text_label(["texts/book.txt:0.75", "answers.jsonl:0.25"])
        ('book.txt', '75 % book.txt, 25 % answers.jsonl')
    """
    sources = sources_of(text)
    if not sources:
        return Path(text if isinstance(text, str) else text[0]).name
    return ", ".join(f"{100 * source.share:.4g} % {Path(source.name).name}" for source in sources)


def described(text: str | Sequence[str]) -> list[dict[str, Any]]:
    """What is stored with a model of a mixture: name, share and, of rows, the fields; nothing of a single text.

    Raises:
        UsageError: As `mix_tokens`.

    Example:
        >>> described(["pydoc:first-half:0.75", "pydoc:second-half:0.25"])[1]
        {'text': 'pydoc:second-half', 'share': 0.25, 'rows': None}
    """
    found = []
    for source in sources_of(text):
        found.append({"text": Path(source.name).name, "share": source.share, "rows": fields_of(source.name)})
    return found


def mix_tokens(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    count: int | None,
    *,
    usual: int = 65_536,
    skip: int = 0,
    window: int = 1024,
    prefix: Sequence[int] = (),
) -> Mixture:
    """Read a mixture.

    Each window has tokens of one text, and the texts take turns by their shares: of any first n windows, each text has
    its share, up to one window. So has the part on which gradients are measured.

    Args:
        sources: The texts.
        tokenizer: The model's.
        count: Number of tokens; if None, `usual`, or fewer if a text is too short for its share of them.
        usual: See count.
        skip: Number of tokens to skip at the start of each text.
        window: Tokens in a window, the prefix included.
        prefix: Tokens at the start of every window, such as BOS, for which room is left.

    Raises:
        UsageError: If a text cannot be read, is too short for its share, or gets no window; or if the tokenizer has no
            chat template for conversations.

    Example:
        >>> sources = sources_of(["pydoc:first-half:0.75", "pydoc:second-half:0.25"])
        >>> mix_tokens(sources, model.load_tokenizer(), 4096, window=256).counts
        (3072, 1024)
    """
    step = window - len(prefix)
    if step < 2:
        raise UsageError(f"window {window} has no room for {len(prefix)} tokens before a text; give a longer window")
    wanted = usual if count is None else count
    turns = _turns([source.share for source in sources], -(-wanted // step))
    if idle := [source.name for number, source in enumerate(sources) if number not in turns]:
        raise UsageError(
            f"{wanted:,} tokens fill too few windows of {window:,} for {idle[0]} to have its share; use more tokens "
            "or a shorter window"
        )
    found = []
    for number, source in enumerate(sources):
        most = turns.count(number) * (step + len(prefix))
        ids, rows = read_tokens(source.name, tokenizer, skip + most)
        found.append((list(_pieces(ids[skip:], step, np.asarray(prefix, np.int32))), rows))
    parts: list[np.ndarray] = []
    counts, used, left = [0] * len(sources), [0] * len(sources), wanted
    for number in turns:
        pieces = found[number][0]
        piece = pieces[used[number]][:left] if used[number] < len(pieces) else np.zeros(0, np.int32)
        if len(piece) < min(step, left):
            if count is not None:
                raise UsageError(_too_short(sources[number], pieces, skip, wanted))
            break
        parts.append(piece)
        counts[number] += len(piece)
        used[number] += 1
        left -= len(piece)
    if not all(counts):
        number = counts.index(0)
        raise UsageError(_too_short(sources[number], found[number][0], skip, wanted))
    return Mixture(np.concatenate(parts), tuple(sources), tuple(counts), tuple(rows for _, rows in found))


def _too_short(source: Source, pieces: Sequence[np.ndarray], skip: int, wanted: int) -> str:
    after = f" after the first {skip:,}" if skip else ""
    return (
        f"the text {source.name} is too short for a share of {source.share:g}: it has {sum(map(len, pieces)):,} tokens"
        f"{after}, and {source.share * wanted:,.0f} are needed of {wanted:,}; lower its share, or ask for fewer tokens"
    )


def _turns(shares: Sequence[float], windows: int) -> list[int]:
    """Which text each window is from: always the one that is furthest below its share."""
    taken, turns = np.zeros(len(shares)), []
    for done in range(1, windows + 1):
        turns.append(int(np.argmax(np.asarray(shares) * done - taken)))
        taken[turns[-1]] += 1
    return turns


def _pieces(ids: np.ndarray, step: int, prefix: np.ndarray) -> Iterator[np.ndarray]:
    """Successive tokens, `step` at a time; without the prefix where a piece begins with it, as `begin_windows` does."""
    start = 0
    while start < len(ids):
        while len(prefix) and np.array_equal(ids[start : start + len(prefix)], prefix):
            start += len(prefix)
        if start < len(ids):
            yield ids[start : start + step]
        start += step


def _source(text: str) -> Source:
    named = _NAMED.fullmatch(text)
    if named is None:
        raise UsageError(
            f"the text {text} has no share; of several texts give each as NAME:SHARE, such as {text}:0.5 (a colon in "
            "a name is part of it, except the last)"
        )
    name, share = named[1], float(named[2])
    if _is_file(text):
        raise UsageError(f"{text} is a file, or {name} with the share {share:g}; write {text}:SHARE, or rename it")
    if not 0 < share <= 1:
        raise UsageError(f"the share of {name} is {share:g}; expected a number above 0, and at most 1")
    if name == "sampled":
        raise UsageError("text that the model samples cannot be mixed with others; give it alone, or files")
    return Source(name, share)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no name of a file
        return False
