"""The one error that users are meant to see."""


class InputError(ValueError):
    """Bad usage or bad input: the command line prints it as one line and exits with code 2.

    The message names the file, field or sample, its value, and the remedy. Libraries raise plain
    ``ValueError`` for faults of ours too, so those keep their traceback and exit code 1.
    """


class LocalError(InputError):
    """An ``InputError`` that perhaps only one of a job's processes met, and which that one must therefore tell."""
