"""Conversion of image classifiers by all methods that have a meaning there; see `__main__`."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """As `python -m experiments.vision`."""
    from experiments.vision.__main__ import main as run

    run(arguments)
