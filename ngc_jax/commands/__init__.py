"""The subcommands of `ngc-jax`: each a frozen config and a `run` that returns its summary.

Configs import nothing heavy, so that `--help` answers at once; `run` imports what it needs.
"""
