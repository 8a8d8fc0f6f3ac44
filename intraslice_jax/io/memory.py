"""How the C library handles freed memory: glibc's is told, others go on as they do."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc


def return_freed_arrays(threshold: int = 2**22) -> None:
    """From now on the process gives arrays above `threshold` bytes back to the system when it frees them.

    By default glibc keeps blocks up to 32 MB for later, in each thread's own arena, so that a program that streams
    a model through many threads seems to hold more and more of it. Smaller blocks come from one arena for all threads.
    With a lower threshold, what XLA's products allocate for themselves would be fetched anew for every product.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, threshold)
    _glibc("mallopt", _M_ARENA_MAX, 1)


def return_freed_blocks() -> None:
    """Gives back what lies free between the smaller blocks, too: once per layer this costs little."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)
