"""How many threads XLA has where devices are CPUs."""

import os

LEAST = 128
"""Programs under way at once hold threads while they wait for another device or process; where there are no more, what
they wait for cannot begin."""


def enough_threads() -> None:
    """Raises the number of XLA's threads, unless the user has set it; call it before jax first counts its devices."""
    os.environ.setdefault("NPROC", str(max(LEAST, os.cpu_count() or 1)))
