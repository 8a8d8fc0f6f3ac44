"""What a report says about the process that made it."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


class StageClock:
    """Wall time and peak memory of the stages of a run.

    Attributes:
        stages: for each finished stage its name, `seconds`, `peak_rss_bytes` (the largest resident memory of the
            process up to its end) and, where the device tells, `peak_device_bytes`.
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def finish(self, name: str) -> None:
        """Books what happened since the last stage, or since the clock was made."""
        now = time.monotonic()
        stage = {"stage": name, "seconds": now - self._last, "peak_rss_bytes": peak_rss_bytes()}
        device = peak_device_bytes()
        self.stages.append(stage if device is None else {**stage, "peak_device_bytes": device})
        self._last = now


def peak_device_bytes() -> int | None:
    """The most memory that a local device has had in use so far, None where devices do not count (CPUs)."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def available_bytes() -> int:
    """Memory that the first local device can still give; of the host where devices do not count."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
