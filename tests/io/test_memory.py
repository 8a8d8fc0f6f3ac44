import platform
import subprocess
import sys

import pytest

_RESIDENT_MIB_BEFORE_AND_AFTER = """
import numpy as np
from intraslice_jax.io.memory import return_freed_arrays, return_freed_blocks

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

{prepare}
held = [np.ones({kibibytes} * 128) for _ in range({count})]
held = held[-1:]  # the heap cannot shrink from its end
before = resident()
{finish}
print(before, resident())
"""


def _resident(prepare: str, kibibytes: int, count: int, finish: str = "") -> list[float]:
    code = _RESIDENT_MIB_BEFORE_AND_AFTER.format(prepare=prepare, kibibytes=kibibytes, count=count, finish=finish)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in found.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
class TestGlibc:
    def test_small_blocks_go_back_when_asked(self):
        before, after = _resident("", 64, 3200, "return_freed_blocks()")
        assert before - after > 150

    def test_large_arrays_go_back_at_once(self):
        kept, _ = _resident("np.ones(2**21 - 2**12); np.ones(2**21 - 2**12)", 8192, 25)
        returned, _ = _resident("return_freed_arrays()", 8192, 25)
        assert kept - returned > 150
