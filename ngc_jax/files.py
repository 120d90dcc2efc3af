"""Writing to disk: whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import stat
import sys
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
            Path(temporary.name).chmod(stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o644)
            Path(temporary.name).replace(file)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; see `write_text`."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def check_target(target: str) -> None:
    """Refuse a place for a summary that cannot be written, before any work is done; see `write_summary`.

    Raises:
        UsageError: If it is a directory, is in none, or must not be written.
    """
    if target == "-":
        return
    if not target or os.path.isdir(target):
        raise UsageError(f"--json {target} is a directory; give a file, or - for standard output")
    # A link's target is written, and may be elsewhere.
    special = _is_special(target)
    place = target if special else os.path.dirname(os.path.realpath(target))
    if not special and not os.path.isdir(place):
        raise UsageError(f"--json {target} is in a directory that does not exist; make it first")
    if not os.access(place, os.W_OK):
        raise UsageError(f"--json {target} cannot be written; choose another place, or - for standard output")


def write_summary(target: str, summary: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, a device or a pipe; `-` is standard output.

    A file is written whole or not at all, and keeps its mode. A link stays a link: what it points to is written.
    """
    text = json.dumps(summary, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif _is_special(target):
        sys.stdout.flush()
        # Appended: /dev/stdout can be a file that already holds what was printed.
        with open(target, "a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(Path(os.path.realpath(target)), text)


def _is_special(target: str) -> bool:
    """Whether it is a device, a pipe, or one of this process's open files, which must not be replaced."""
    inside = os.path.abspath(target).startswith(("/dev/", "/proc/"))
    return inside or (os.path.exists(target) and not os.path.isfile(target))


_ADVICE = {
    errno.ENOSPC: "make space on the disk, or choose another place",
    errno.EDQUOT: "make space within your quota, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "check the links on the path",
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
    errno.ENOMEM: "take smaller batches or a smaller type, or a machine with more memory",
}


def explain(error: OSError | MemoryError) -> str | None:
    """An error of the operating system's in one line, with what to do; None if a person cannot put it right."""
    if isinstance(error, MemoryError):
        return "out of memory; take smaller batches or a smaller type, or a machine with more memory"
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}; {advice}"


@contextmanager
def os_errors(place: Path) -> Iterator[None]:
    """Turn what libraries in other languages make of a full disk into the operating system's own error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = quoted_errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def quoted_errno(error: BaseException) -> int | None:
    """The number of an error of the operating system's that an exception, or what caused it, quotes in its message."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        # Of Rust: (os error 28); of tensorstore: [os_error_code='28']; of Python: [Errno 28].
        found = re.search(r"(?i)os.error(?: |_code=\W*)(\d+)|\[Errno (\d+)\]", str(seen))
        if found is not None:
            return int(found[1] or found[2])
        seen = seen.__cause__ or seen.__context__
    return None


def check_output(directory: str | Path, overwrite: bool) -> Path:
    """Refuse an output directory that must not be written, before any work is done.

    Raises:
        UsageError: If it exists and `overwrite` is false, or is not a directory of a model, or has no parent.
    """
    directory = Path(os.path.abspath(os.path.expanduser(directory)))  # "." has no name, and links are left as they are
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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{directory} is a file, or is below one; choose another --out") from None
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
