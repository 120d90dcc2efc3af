"""Statistics on disk, one .npz file for each layer, so that a long comparison measures them once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax.conversion.statistics import OutputGradients, Statistics

_GRADIENTS = ("mean_square", "second_moment")
_INPUTS = ("second_moment", "absolute_mean")


def save_statistics(
    layers: Sequence[Mapping[str, Statistics]], directory: str | Path, about: Mapping[str, Any]
) -> None:
    """Write the statistics of all layers atomically; arrays that blocks of one input site share are written once.

    Args:
        layers: By block name.
        directory: Created, or replaced if it exists.
        about: Plain data to store with them.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        for number, layer in enumerate(layers):
            arrays: dict[str, np.ndarray] = {}
            index: dict[str, Any] = {}

            def put(name: str, array: np.ndarray | None, arrays: dict[str, np.ndarray] = arrays) -> str | None:
                if array is None:
                    return None
                arrays[name] = array
                return name

            for block, s in layer.items():
                gradients = None
                if s.gradients is not None:
                    parts = {field: put(f"{block}.{field}", getattr(s.gradients, field)) for field in _GRADIENTS}
                    gradients = {"count": s.gradients.count, **parts}
                fields = {field: put(f"{s.site or block}.inputs.{field}", getattr(s, field)) for field in _INPUTS}
                fisher = put(f"{block}.fisher", s.fisher)
                index[block] = {"count": s.count, "site": s.site, **fields, "fisher": fisher, "gradients": gradients}
            np.savez(temporary / f"{number}.npz", **arrays)  # type: ignore[arg-type]
            (temporary / f"{number}.json").write_text(json.dumps(index), encoding="utf-8")
        (temporary / "about.json").write_text(json.dumps({"layers": len(layers), **about}), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_statistics(directory: str | Path) -> tuple[list[dict[str, Statistics]], dict[str, Any]] | None:
    """Read the result of `save_statistics`: the layers and `about`; None if there is nothing."""
    directory = Path(directory)
    if not (directory / "about.json").is_file():
        return None
    about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
    layers = []
    for number in range(about["layers"]):
        index = json.loads((directory / f"{number}.json").read_text(encoding="utf-8"))
        with np.load(directory / f"{number}.npz", allow_pickle=False) as file:
            arrays: dict[str | None, np.ndarray | None] = {name: file[name] for name in file.files}
        arrays[None] = None
        layers.append({block: _statistics(entry, arrays) for block, entry in index.items()})
    return layers, about


def _statistics(entry: dict[str, Any], arrays: dict[str | None, Any]) -> Statistics:
    gradients = entry["gradients"]
    if gradients is not None:
        gradients = OutputGradients(gradients["count"], *(arrays[gradients[field]] for field in _GRADIENTS))
    second, absolute, fisher = (arrays[entry[field]] for field in (*_INPUTS, "fisher"))
    return Statistics(entry["count"], second, absolute, fisher, gradients, site=entry["site"])
