"""Methods of conversion against each other: perplexity and tasks; see `__main__`."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """As `python -m experiments.arena`."""
    from experiments.arena.__main__ import main as run

    run(arguments)
