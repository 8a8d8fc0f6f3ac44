"""How the C library handles freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc


def return_freed_arrays(threshold: int = 2**21) -> None:
    """From now on the process gives arrays above `threshold` bytes back to the system when it frees them.

    By default glibc keeps blocks up to 32 MB for later, in each thread's own arena, so that a program that streams
    a model through many threads seems to hold more and more of it. Smaller blocks come from one arena for all threads.
    With a lower threshold, what XLA's products allocate for themselves would be fetched anew for every product. Does
    nothing with other C libraries.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            glibc = ctypes.CDLL(None)
            glibc.mallopt(_M_MMAP_THRESHOLD, threshold)
            glibc.mallopt(_M_ARENA_MAX, 1)
