"""Atomic writing to disk, by one process at a time."""

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
from types import TracebackType
from typing import Any, Self, TextIO

from ngc_jax.errors import UsageError

_LOCK = ".lock"


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text to a file, a device or a pipe.

    A file is written atomically, and keeps its mode. A link is kept: its target is written.

    Raises:
        OSError: If it cannot be written; an existing file is unchanged.
    """
    place = _follow(file)
    if isinstance(place, int):
        # Not opened by name: that would truncate a regular file, and a socket has no name.
        with os.fdopen(os.dup(place), "w", encoding="utf-8") as descriptor:
            descriptor.write(text)
    elif place.exists() and not place.is_file():
        place.write_text(text, encoding="utf-8")
    else:
        with atomic_file(place) as temporary:
            temporary.write_text(text, encoding="utf-8")


class Closing:
    """A context manager that closes itself at its end; subclasses have `close`."""

    def close(self) -> None:
        """Release what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for files from any source.

    Raises:
        ValueError: If it is not JSON, or nested deeper than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; see `write_text`."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextmanager
def atomic_file(file: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `file` on success and is removed on failure.

    For a link, its target is replaced and the link is kept. The mode is kept too. Temporary files of killed processes
    are removed first.

    Raises:
        OSError: If the place is not a regular file, or cannot be written.
    """
    place = _follow(file)
    if isinstance(place, int) or (place.exists() and not place.is_file()):
        raise OSError(errno.EINVAL, "not a file", str(file))
    prefix = f".{place.name[:50]}-new-"
    for left in place.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_unlocked(left)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=prefix)
    temporary = Path(name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        temporary.chmod(stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o644)
        temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _remove_unlocked(file: Path) -> None:
    """Remove a temporary file whose process no longer exists."""
    try:
        with file.open("rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    except OSError:  # a directory, or its process is running
        return


def check_target(target: str, option: str = "--json") -> None:
    """Refuse an output for text that cannot be written, before any work is done; see `write_text`.

    Args:
        target: A path, or - for standard output.
        option: The option that it was given by, for the message.

    Raises:
        UsageError: If it is a directory, has no existing parent, or is not writable.
        OSError: If the path cannot be resolved.
    """
    if target == "-":
        return
    if not target or os.path.isdir(target):
        raise UsageError(f"{option} {target} is a directory; give a file")
    place = _follow(target)
    if isinstance(place, int):
        try:
            writable = fcntl.fcntl(place, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        except OSError:
            writable = False
    else:
        if not place.parent.is_dir():
            raise UsageError(f"{option} {target} is in a directory that does not exist; create it first")
        special = place.exists() and not place.is_file()
        writable = os.access(place if special else place.parent, os.W_OK)
    if not writable:
        raise UsageError(f"{option} {target} cannot be written; choose another place")


def write_summary(target: str, summary: Mapping[str, Any]) -> None:
    """Write a JSON object to a target that `check_target` accepts; `-` is standard output."""
    if target == "-":
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    sys.stdout.flush()  # it may be the same pipe or file
    write_json(Path(target), summary)


_MOST_LINKS = 40  # as Linux allows


def _follow(path: str | Path) -> Path | int:
    """The file that a path names after all links are resolved, or the number of this process's open file."""
    place = os.path.abspath(os.path.expanduser(path))
    for _ in range(_MOST_LINKS):
        place = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
        opened = re.fullmatch(rf"(?:/dev|/proc/{os.getpid()}(?:/task/\d+)?)/fd/(\d+)", place)
        if opened is not None:
            return int(opened[1])
        if not os.path.islink(place):
            return Path(place)
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


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
    errno.ENXIO: "check that it is a file",
    errno.EBADF: "check that it is open",
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
    errno.ENOMEM: "use smaller batches, a smaller dtype or a machine with more memory",
}


def explain(error: OSError | MemoryError) -> str | None:
    """An error of the operating system in one line, with advice; None if the user cannot fix it."""
    if isinstance(error, MemoryError):
        return "out of memory; use smaller batches, a smaller dtype or a machine with more memory"
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}; {advice}"


@contextmanager
def os_errors(place: Path) -> Iterator[None]:
    """Convert other libraries' errors for a full disk to the operating system's own error."""
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
    """The operating system's error number that an exception, or its cause, quotes in its message."""
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

    Returns:
        The directory. With `overwrite` a link is kept, and its target is replaced.

    Raises:
        UsageError: If it exists and `overwrite` is false, or is not a directory of a model, or has no parent.
    """
    directory = Path(os.path.abspath(os.path.expanduser(directory)))  # "." has no name
    if overwrite and directory.is_symlink():
        directory = Path(os.path.realpath(directory))
    if directory.exists() or directory.is_symlink():
        if not overwrite:
            raise UsageError(f"{directory} exists; choose another --out or add --overwrite")
        if not directory.is_dir() or (any(directory.iterdir()) and not _is_model(directory)):
            raise UsageError(f"{directory} is not a model directory and will not be overwritten; choose another --out")
    ancestor = next(parent for parent in directory.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UsageError(f"{directory} cannot be created in {ancestor}; choose an --out that can be written")
    return directory


def _is_model(directory: Path) -> bool:
    # Many directories have a config.json, and a replaced directory is lost.
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


@contextmanager
def atomic_directory(directory: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `directory` that replaces it on success and is removed on failure.

    Temporary directories of killed processes are removed first. If such a process was killed between moving the old
    directory aside and the new one into its place, the old one is restored.

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
        with suppress(OSError):  # another program may have written there
            for parent in new_parents:
                parent.rmdir()
        raise


@contextmanager
def _temporary_directory(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, locked while this process runs; removed at the end if it still exists."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-new-", dir=directory.parent))
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _replace(directory: Path, new: Path) -> None:
    """Rename `new` to `directory`; the old content is deleted, or restored if that fails."""
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
        except OSError:  # its process is running
            continue
        finally:
            os.close(descriptor)


@contextmanager
def lock_directory(directory: str | Path) -> Iterator[Path]:
    """Lock a directory for this process; it is created if it is missing, and removed if it remains empty.

    The lock is the operating system's: it ends with the process, however the process ends.

    Raises:
        UsageError: If another process holds the lock, with that process's number.
    """
    directory = Path(directory)
    new = [place for place in (directory, *directory.parents) if not place.exists()]
    file = _lock_file(directory)
    while file is None:  # it was removed by its holder between being opened and locked
        file = _lock_file(directory)
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield directory
        finally:
            with suppress(OSError):
                (directory / _LOCK).unlink()
                for place in new:
                    place.rmdir()


def _lock_file(directory: Path) -> TextIO | None:
    """The directory's lock file, open and locked; None if it no longer belongs to the directory."""
    path = directory / _LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{directory} is a file, or is below one; choose another --out") from None
    except FileNotFoundError:
        if not directory.exists():
            return None
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UsageError(
            f"{directory} is in use by process {holder}; wait for it to end, stop it, or choose another --out"
        ) from None
    file.close()
    return None
