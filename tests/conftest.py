"""Settings of every test run; they must stand before the first import of jax or huggingface_hub."""

import os
import tempfile

import hypothesis
import pytest

# Tests are about numbers that must be the same everywhere: the developer's GPU or TPU is not used.
os.environ["JAX_PLATFORMS"] = "cpu"

# Several devices, so that shardings and pmap are really exercised. Other flags of the caller's are kept.
_DEVICE_FLAG = "--xla_force_host_platform_device_count"
_flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICE_FLAG)]
os.environ["XLA_FLAGS"] = " ".join([*_flags, f"{_DEVICE_FLAG}=8"])

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


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary Hugging Face cache."""
    _hf_home.cleanup()
