"""Texts for calibration and evaluation, and the windows that their tokens are cut into.

A text is named by
- a path to a UTF-8 file or pipe (on the command line, - is standard input); a byte order mark is dropped;
- `pydoc`, the documentation that is part of every Python (`pydoc_data.topics`), or `pydoc:first-half` and
  `pydoc:second-half`, two parts with no sentence in common: no network needed;
- `hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, a dataset of the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError

DEFAULT_CALIBRATION_TEXT = "pydoc:first-half"
DEFAULT_EVALUATION_TEXT = "pydoc:second-half"


def read_text(text: str) -> str:
    """Read a text by its name.

    Raises:
        UsageError: If there is no such text, it cannot be read, or it is empty.

    Example:
        >>> "object" in read_text("pydoc")
        True
    """
    if text == "pydoc" or text.startswith("pydoc:"):
        content = _pydoc(text)
    elif text.startswith("hub:"):
        content = _hub(text)
    else:
        content = _file(Path(text))
    if not content.strip():
        raise UsageError(f"the text {text} is empty; give one with at least a few thousand words")
    return content


def _file(path: Path) -> str:
    path = path.expanduser()
    try:
        # A pipe has no size and is read once, so it is not checked beforehand.
        return path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise UsageError(f"there is no text file {path}: it is a directory; give a file, pydoc, or hub:NAME") from None
    except FileNotFoundError:
        raise UsageError(f"there is no text file {path}; give a file, pydoc, or hub:NAME") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(path)[:200]} cannot be read: {reason}; check its name and its permissions") from error


def _pydoc(text: str) -> str:
    from pydoc_data.topics import topics

    # Topics are in alphabetical order; taking every other one gives halves with the same subjects and other content.
    names = sorted(topics)
    parts = {"pydoc": names, "pydoc:first-half": names[::2], "pydoc:second-half": names[1::2]}
    if text not in parts:
        raise UsageError(f"there is no text {text!r}; expected one of {', '.join(parts)}")
    return "\n\n".join(topics[name] for name in parts[text])


def _hub(text: str) -> str:
    _, name, *rest = text.split(":")
    config, split, column = (rest + [""] * 3)[:3]
    rows = load_hub_rows(text, name, config, split or "train")
    column = column or "text"
    if column not in rows.column_names:
        raise UsageError(f"the dataset {text} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return "\n".join(rows[column])


def load_hub_rows(text: str, name: str, config: str, split: str) -> Any:
    """A split of a dataset of the Hugging Face hub, or of a directory with data files.

    Args:
        text: What the user wrote, for messages.
        name: The dataset's name, or a directory.
        config: Its configuration; empty for the default.
        split: The split.

    Returns:
        A `datasets.Dataset`.

    Raises:
        UsageError: If it cannot be loaded.
        ModuleNotFoundError: If the package `datasets` is not installed.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"the dataset {text} cannot be loaded ({reason}); check its name and the network, or give a file"
        ) from error


def split_windows(tokens: np.ndarray, window: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut a token stream into batches of non-overlapping windows; the last ones are padded.

    Args:
        tokens: (T,), one stream.
        window: Tokens in a window.
        batch_size: Windows in a batch.

    Returns:
        Batches of (tokens, positions), both (batch_size, window) int32; positions are -1 where padded.
    """
    window = min(window, len(tokens))
    count = -(-len(tokens) // window)
    rows = -(-count // batch_size) * batch_size
    padded = np.zeros(rows * window, np.int32)
    padded[: len(tokens)] = tokens
    positions = np.tile(np.arange(window, dtype=np.int32), rows)
    positions[len(tokens) :] = -1
    shape = (-1, batch_size, window)
    return list(zip(padded.reshape(shape), positions.reshape(shape), strict=True))
