"""What ngc-jax does on an accelerator; see `__main__`."""


def main(arguments: list[str] | None = None) -> int:
    """As `python -m experiments.accelerator_check`."""
    from experiments.accelerator_check.__main__ import main as run  # it sets variables that jax reads

    return run(arguments)
