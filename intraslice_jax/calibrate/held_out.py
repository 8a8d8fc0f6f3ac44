"""Which calibration windows only judge what was made from the others: the last ones."""

HELD_OUT = 1 / 8
"""Fraction of the windows."""


def held_out_count(samples: int) -> int:
    """How many of so many windows; at least one."""
    return max(1, round(samples * HELD_OUT))
