"""The one error type that means "the input is at fault, and here is what to do"."""


class UsageError(ValueError):
    """Input that a person can put right.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it without
    a traceback and exits with code 2; library callers catch it as the ValueError that it is.
    """
