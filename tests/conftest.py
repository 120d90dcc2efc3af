"""Settings of every test run; they must stand before the first import of jax or huggingface_hub."""

import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# A job in the background of a shell script is started with Ctrl-C ignored, and so would be what the tests start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each worker of pytest-xdist has a processor of its own, and the matrices are small: a second thread of BLAS would only
# wait, busily. Read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests are about numbers that must be the same everywhere: the developer's GPU or TPU is not used.
os.environ["JAX_PLATFORMS"] = "cpu"

# Several devices, so that shardings and pmap are really exercised. On a busy machine of few cores one may wait for the
# others longer than the 40 seconds after which XLA ends the process. Most of a test is compiling, which takes a quarter
# less time without LLVM's optimisations, and four tenths less again without the emitters that write fusions by way of
# MLIR; jaxlib 0.11 ends with an error at that last flag. A program is one module: splitting it for threads to compile
# is of no use where other workers take the processors. Other flags of the caller's are kept.
_XLA_FLAGS: dict[str, object] = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    _XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.split("=")[0] not in _XLA_FLAGS]
os.environ["XLA_FLAGS"] = " ".join([*_others, *(f"{flag}={value}" for flag, value in _XLA_FLAGS.items())])

# Nearly all the time of a test run goes into compiling. Kept programs save most of it in a second run, and some of it
# in a first one, whose workers compile the same programs. The key of an entry is the whole program, the flags and
# jax's version. `make clean` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# The shapes and types that the pure functions of groups declare are checked whenever a test calls one. Elsewhere NumPy
# arrays are taken where JAX's are declared.
install_import_hook(
    [f"ngc_jax.groups.{name}" for name in ("kernels", "states", "gauge", "dynamics")], "beartype.beartype"
)

# Tracing makes many objects that live on; each collection looks at them all, and jax adds work of its own to it.
gc.set_threshold(200_000, 20, 100)

# No test may reach the network by accident, or pass only because of what its author once downloaded: the
# Hugging Face libraries work offline, with an empty cache that goes away with the run. (real_model tests get
# their model from the package index.)
_hf_home = tempfile.TemporaryDirectory(prefix="ngc-jax-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _hf_home.name
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)

# An example may compile a function, which takes a thousand times as long as running it: no deadline. `ci`
# always draws the same examples, so that a change fails for what it changed.
hypothesis.settings.register_profile("default", max_examples=50, deadline=None)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


# Of the 65,530 pieces of memory that Linux lets a process map; one file of tests makes a few thousand.
_MANY_MAPS = 45_000


@pytest.fixture(scope="module", autouse=True)
def _let_go_of_compiled_programs() -> Iterator[None]:
    """Every program that jax compiles maps several pieces of memory, and jaxlib crashes where it cannot map another.

    A test run has more. But the next file uses many of the same programs: they are kept until there are many.
    """
    yield
    if sys.platform == "linux" and Path("/proc/self/maps").read_bytes().count(b"\n") > _MANY_MAPS:
        import jax  # not above: the settings must stand before

        jax.clear_caches()


# Whatever takes longest begins first: no worker is left with it at the end.
_FIRST = ("stability", "training", "commands", "conversion", "models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by folder; `--no-loadscope-reorder` lets pytest-xdist keep it."""
    rank = {name: index for index, name in enumerate(_FIRST)}
    folders = Path(__file__).parent
    items.sort(key=lambda item: rank.get(item.path.relative_to(folders).parts[0], len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Let jax compile again, as it does by itself, where an interrupted run left half an entry in its cache."""
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry:UserWarning"
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary Hugging Face cache."""
    _hf_home.cleanup()
