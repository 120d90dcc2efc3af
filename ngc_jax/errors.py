"""The one error type for invalid input, with advice."""


class UsageError(ValueError):
    """Invalid input that the user can correct.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it without
    a traceback and exits with code 2; library callers can catch it as a ValueError.

    Example:
        >>> from ngc_jax import Recipe, UsageError
        >>> try:
        ...     Recipe("ngc", keep=2)
        ... except UsageError as error:
        ...     print(error)
        keep ratio 2 is outside (0, 1]; 0.8 keeps 80 % of the parameters
    """
