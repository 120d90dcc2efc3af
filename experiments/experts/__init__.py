"""A mixture of experts trained from scratch, and converted with and without latent spaces that its experts share."""


def main() -> None:
    """As `python -m experiments.experts`."""
    from experiments.experts.__main__ import main as run

    run()
