"""Runs `eight_devices.py`: the number of devices is fixed when jax starts, and one is best for all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intraslice_jax.parallel.threads import LEAST

FILE = Path(__file__).with_name("eight_devices.py")


@pytest.mark.slow
def test_on_eight_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "NPROC": str(LEAST)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(FILE)]
    root = FILE.parent.parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
