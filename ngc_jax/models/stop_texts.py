"""Texts at which generation ends; they may be of any tokens, or end within one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import Tokenizer


class StopTexts:
    """Texts after which a continuation ends.

    Attributes:
        texts: The texts.

    Example:
        >>> stops = StopTexts(model.load_tokenizer(), ["ps"])
        >>> tokens = model.load_tokenizer().encode("Groups of neurons")
        >>> stops.end(tokens), stops.end(tokens[:5])
        (6, None)
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        """Keep the tokenizer, which decodes continuations.

        Raises:
            UsageError: If there is no text, or one is empty.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UsageError(f"stop texts are {texts!r:.60}; expected a list of texts that are not empty")
        self.texts = tuple(texts)
        self._tokenizer = tokenizer

    def end(self, tokens: np.ndarray, start: int = 0) -> int | None:
        """The number of tokens by which the first of the texts is complete.

        Args:
            tokens: (L,) ids of a continuation.
            start: A number of tokens by which none is.

        Returns:
            The number; None if none of the texts occurs.
        """
        if not self._found(tokens):
            return None
        return next(count for count in range(start + 1, len(tokens) + 1) if self._found(tokens[:count]))

    def _found(self, tokens: np.ndarray) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in self.texts)
