"""`python -m ngc_jax`, the same as the command `ngc-jax`."""

import sys

from ngc_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
