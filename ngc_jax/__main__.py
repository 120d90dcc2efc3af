"""The command `ngc-jax`; `python -m ngc_jax` is the same."""

import signal
import sys


def main() -> int:
    """Run the command line and return its exit code; see `ngc_jax.cli.main`."""
    try:
        from ngc_jax import cli  # takes a moment, during which Ctrl-C may arrive

        code = cli.main()
    except KeyboardInterrupt:
        print("ngc-jax: interrupted", file=sys.stderr)
        code = 130
    if code == 130:
        # Another Ctrl-C, while libraries end their threads, ends the process silently. If the first one arrived in code
        # that a library made from text, Python would die of the signal at exit, unless it runs a text again.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
