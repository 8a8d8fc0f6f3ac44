"""Cutting a set of sequences into batches that every device row gets an equal part of."""

from __future__ import annotations

import math
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
    """The multiple that spreads `count` windows most evenly over about as few steps as `most` allows."""
    return math.ceil(count / math.ceil(count / most) / multiple) * multiple
