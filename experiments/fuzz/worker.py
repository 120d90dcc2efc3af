"""The process that runs commands on mutated inputs, one after the other."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.fuzz.inputs import Case, make_case
from experiments.fuzz.seeds import make_seeds
from ngc_jax import cli
from ngc_jax.errors import UsageError

MEMORY = 12 << 30
# Python's audit events that change the file system; each with the positions of its paths.
_WRITES = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
}
# Of processor time, which does not depend on other load; the parent ends a process that waits forever.
SECONDS = 60
# Output of other packages on standard error: Python's warnings, Rust's panics, C++'s logs.
_NOISE = re.compile(r"^(.*:\d+: \w*Warning: .*|thread .* panicked at .*|[WEF]\d{4} \d\d:\d\d:\d\d.*)$", re.MULTILINE)


class TooLong(BaseException):
    """An input that exceeds the time limit."""


def confine(*roots: Path) -> None:
    """Let this process change files below these directories only, until it ends.

    A mutated option can name any path of the machine, and the fuzzer may run as root. A write elsewhere gets the
    operating system's error for it.
    """
    allowed = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(mode and set(mode) & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            paths = [path] if writes else []
        else:
            paths = [arguments[place] for place in _WRITES.get(event, ())]
        for path in paths:
            if isinstance(path, int) or path is None:
                continue
            real = os.path.realpath(os.fsdecode(path))
            if real != os.devnull and not f"{real}{os.sep}".startswith(allowed):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

    sys.addaudithook(check)


def outcome_of(case: Case, place: Path) -> str:
    """accepted, refused or fault, with the reason."""
    before = {path.name for path in place.iterdir()}
    out, err = io.StringIO(), io.StringIO()
    native: list[str] = []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _native_stderr(native):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            code = read_rows(case.command) if case.command[0] == "rows" else cli.main(case.command)
    except SystemExit as error:
        return f"fault: SystemExit {error.code}"
    except TooLong:
        return f"fault: longer than {SECONDS} s"
    except BaseException as error:  # Rust's panics are not Exceptions
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "ngc_jax" in frame.filename][-1:]
        where = f"{Path((ours or [last])[0].filename).name}:{(ours or [last])[0].lineno}"
        return f"fault: {type(error).__name__} at {where}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return judge(code, "".join([*native, err.getvalue()]), {path.name for path in place.iterdir()} - before)


@contextlib.contextmanager
def _native_stderr(texts: list[str]) -> Iterator[None]:
    """Append the output of code outside Python on standard error, such as the message of a panic in Rust."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def judge(code: int, stderr: str, written: set[str]) -> str:
    """The outcome from an exit code, standard error and new files."""
    noise = _NOISE.search(stderr)
    if noise:
        return f"fault: noise: {noise.group().strip()[:200]}"
    hidden = sorted(name for name in written if name.startswith("."))
    if hidden:
        return f"fault: {hidden[0]} was left behind"
    if code == 0:
        return "accepted"
    if code != 2:
        return f"fault: exit code {code}"
    if written:
        return f"fault: refused, but {sorted(written)[0]} was written"
    lines = [line for line in stderr.splitlines() if not line.endswith(" done")]
    complaints = [index for index, line in enumerate(lines) if line.startswith("ngc-jax: error: ")]
    if len(complaints) != 1 or len(lines) - complaints[0] not in (1, 3) or "Traceback" in stderr:
        return f"fault: complaint of {len(lines)} lines: {stderr[-200:]!r}"
    return f"refused: {lines[complaints[0]][:300]}"


def read_rows(command: list[str]) -> int:
    """Make training rows from a file, as `train` and `distil` do; returns their exit code."""
    from ngc_jax.models.sources import open_source
    from ngc_jax.training.data import DataConfig, make_pipeline

    _, file, column, model = command
    try:
        with open_source(model) as source:
            tokenizer = source.tokenizer()
        options = {"name": file, "prompt_column": column} if column == "prompt" else {"name": file}
        config = DataConfig(sources=(options,), sequence_length=16, batch_size=1, prefetch=0)
        next(iter(make_pipeline(config, tokenizer, vocab_size=300)))
    except UsageError as error:
        print(f"ngc-jax: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(seeds: Path, log: Path, seed: int, first: int, last: int, faults: Path) -> None:
    """Run inputs `first` to before `last`; writes one line into the log before each and one after it."""
    with log.open("a", encoding="utf-8") as lines:
        for number in range(first, last):
            with tempfile.TemporaryDirectory(prefix="ngc-jax-fuzz-case-") as directory:
                place = Path(directory) / "case"
                place.mkdir()
                os.chdir(place)
                case = make_case(number, seed, seeds, place)
                line = {"number": number, "kind": case.kind, "outcome": "begun"}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                outcome = outcome_of(case, place)
                lines.write(json.dumps({**line, "outcome": outcome}) + "\n")
                lines.flush()
                if outcome.startswith("fault"):
                    shutil.copytree(place, faults / str(number), dirs_exist_ok=True)
                    (faults / str(number) / "command.json").write_text(json.dumps(case.command), encoding="utf-8")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def main() -> None:
    """Seeds DIRECTORY, or run SEEDS LOG SEED FIRST LAST FAULTS."""
    if sys.argv[1] == "seeds":
        make_seeds(Path(sys.argv[2]))
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _too_long)
    seeds, log, seed, first, last, faults = sys.argv[2:]
    Path(faults).mkdir(parents=True, exist_ok=True)
    confine(Path(log).parent, Path(faults))
    run(Path(seeds), Path(log), int(seed), int(first), int(last), Path(faults))


if __name__ == "__main__":
    main()
