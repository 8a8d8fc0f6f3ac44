"""The two kinds of failure that reach a user as one line."""


class InputError(ValueError):
    """A wrong input: the message names the thing, what was found, what was expected and how to mend it.

    The command line prints the message alone and exits with code 2.
    """


class RunError(RuntimeError):
    """A failure in the middle of a run (a NaN in an activation, a full disk); exit code 1."""
