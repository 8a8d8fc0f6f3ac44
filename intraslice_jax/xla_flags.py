"""Flags of XLA, of which every release drops some: a process ends without a word at one that XLA does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def known_flags(flags: Sequence[str]) -> list[str]:
    """Those of the flags that the installed XLA knows. Tried in processes of their own, some tenths of a second each.

    Args:
        flags: such as `--xla_backend_optimization_level=0`.
    """
    return list(flags) if _starts(flags) else [flag for flag in flags if _starts([flag])]


def _starts(flags: Sequence[str]) -> bool:
    client = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    return subprocess.run([sys.executable, "-c", client], env=environment, capture_output=True).returncode == 0
