"""Writing to disk: whole or not at all, and by one process at a time."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError

_LOCK = ".lock"


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, replacing what was there.

    Raises:
        OSError: If it cannot be written; what was there is unchanged.
    """
    with tempfile.NamedTemporaryFile("w", dir=file.absolute().parent, delete=False, encoding="utf-8") as temporary:
        try:
            temporary.write(text)
            temporary.close()
            Path(temporary.name).chmod(0o644)
            Path(temporary.name).replace(file)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; see `write_text`."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def check_output(directory: str | Path, overwrite: bool) -> Path:
    """Refuse an output directory that must not be written, before any work is done.

    Raises:
        UsageError: If it exists and `overwrite` is false, or is not a directory of a model, or has no parent.
    """
    directory = Path(os.path.abspath(directory))  # "." has no name, and links are left as they are
    if directory.exists() or directory.is_symlink():
        if not overwrite:
            raise UsageError(f"{directory} exists; choose another --out or add --overwrite")
        if not directory.is_dir() or (any(directory.iterdir()) and not _is_model(directory)):
            raise UsageError(f"{directory} is not a model directory and will not be overwritten; choose another --out")
    ancestor = next(parent for parent in directory.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UsageError(f"{directory} cannot be made in {ancestor}; choose an --out that can be written")
    return directory


def _is_model(directory: Path) -> bool:
    # Many things have a config.json, and what is replaced is gone.
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


@contextmanager
def atomic_directory(directory: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place on success and vanishes on failure.

    What a process that was killed left beside it is removed first; if that process was killed between moving the old
    directory aside and the new one into its place, the old one is put back.

    Raises:
        UsageError: See `check_output`.
    """
    directory = check_output(directory, overwrite)
    _clean_up(directory)
    directory = check_output(directory, overwrite)
    new_parents = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _temporary_directory(directory) as temporary:
            yield temporary
            temporary.chmod(0o755)
            _replace(directory, temporary)
    except BaseException:
        with suppress(OSError):  # another program may have put something there
            for parent in new_parents:
                parent.rmdir()
        raise


@contextmanager
def _temporary_directory(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, locked while this process is at work; removed if it is still there."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-new-", dir=directory.parent))
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _replace(directory: Path, new: Path) -> None:
    """Rename `new` to `directory`; what was there is deleted, or put back if that fails."""
    if not directory.exists():
        new.rename(directory)
        return
    with _temporary_directory(directory) as aside:
        old = aside / "old"
        try:
            directory.rename(old)
            new.rename(directory)
        except BaseException:
            if old.exists() and not directory.exists():
                old.rename(directory)
            raise


def _clean_up(directory: Path) -> None:
    """Remove the temporary directories of processes that were killed."""
    for left in directory.parent.glob(f".{glob.escape(directory.name)}-new-*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (left / "old").is_dir() and not directory.exists():
                (left / "old").rename(directory)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # its process is at work
            continue
        finally:
            os.close(descriptor)


@contextmanager
def lock_directory(directory: str | Path) -> Iterator[Path]:
    """Keep a directory for this process; it is made if it is missing.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        UsageError: If another process has it, with that process's number.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UsageError(
                f"{directory} is in use by process {holder}; wait for it to end, stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield directory
