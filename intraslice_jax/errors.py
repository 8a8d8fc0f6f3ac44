"""The two kinds of failure that reach a user as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A wrong input: the message names the thing, what was found, what was expected and how to mend it.

    The command line prints the message alone and exits with code 2.
    """


class RunError(RuntimeError):
    """A failure in the middle of a run (a NaN in an activation, a full disk); exit code 1."""


@contextmanager
def refused(problem: str, advice: str = "") -> Iterator[None]:
    """What a library raises on foreign input, as an InputError `PROBLEM (its message); ADVICE`.

    A panic of a library written in Rust counts, although Python sees it as no `Exception`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{problem} ({words[:300]}){'; ' if advice else ''}{advice}") from error
