"""Cutting a set of sequences into batches that every device row gets an equal part of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def even_batches(count: int, per_device: int, ways: int) -> Iterator[tuple[Int[np.ndarray, " batch"], int]]:
    """Indices of the sequences of each batch, and how many of them, from the first, count.

    All batches but the last have `per_device` sequences for each of `ways` device rows. What does not divide makes a
    last batch of one sequence per row, filled up with copies.

    Args:
        count: how many sequences there are.
        per_device: best a divisor of `count // ways`: else one more batch is smaller.
        ways: device rows.
    """
    full = count - count % ways
    for start in range(0, full, per_device * ways):
        stop = min(start + per_device * ways, full)
        yield np.arange(start, stop), stop - start
    if full < count:
        yield np.minimum(np.arange(full, full + ways), count - 1), count - full


def even_batch(count: int, most: int, multiple: int = 1) -> int:
    """How many of `count` windows make a step, so that the fewest copies fill up the last one.

    A multiple of `multiple`; more than half of `most` and not more, where there is such a one.
    """
    most = min(most, -(-count // multiple) * multiple)
    sizes = range(multiple, max(most, multiple) + 1, multiple)
    return min(sizes, key=lambda size: (2 * size <= most, -count % size, -size))
