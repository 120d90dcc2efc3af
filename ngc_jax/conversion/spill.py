"""States kept on disk while the ranks are not known: at full rank all groups take more memory than the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ngc_jax.conversion.closed_form import Factors


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A group's fitted states and the typical magnitude of its inputs.

    Attributes:
        states: At full rank and nested as long as ranks are not known.
        input_scale: (I,) root mean square of every input neuron; None without statistics.
    """

    states: Factors
    input_scale: np.ndarray | None


class Spill:
    """A directory of fitted groups, in float32; energies and sizes remain in memory."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._numbers: dict[str, int] = {}
        self._kept: dict[str, Fitted] = {}

    def put(self, name: str, fitted: Fitted) -> None:
        """Store a group."""
        number = self._numbers.setdefault(name, len(self._numbers))
        states = fitted.states
        arrays = [states.input_states, *states.output_states]
        # Contiguous, because the file's bytes are read that way.
        save_file({str(i): np.ascontiguousarray(a, np.float32) for i, a in enumerate(arrays)}, self._path(number))
        self._kept[name] = Fitted(Factors(np.empty((0, 0)), (), states.energies, states.nested), fitted.input_scale)

    def energies(self, name: str) -> np.ndarray | None:
        """Loss that each latent dimension of a group saves."""
        return self._kept[name].states.energies

    def nested(self, name: str) -> bool:
        """Whether a group's states can be truncated."""
        return self._kept[name].states.nested

    def get(self, name: str) -> Fitted:
        """Read a group back; safe to call from several threads."""
        # Not .npz: NumPy parses its headers as Python, which in 3.11 fails occasionally in several threads
        # (python/cpython#106905).
        found = load_file(self._path(self._numbers[name]))
        arrays = [found[str(i)] for i in range(len(found))]
        kept = self._kept[name]
        return Fitted(Factors(arrays[0], tuple(arrays[1:]), kept.states.energies, kept.states.nested), kept.input_scale)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number}.safetensors"
