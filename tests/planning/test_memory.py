"""The planned peak against that of a real run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intraslice_jax.config import LayerShape, ModelConfig, uniform_query_to_kv
from intraslice_jax.planning.plan import Run, make_plan

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_the_peak_is_the_measured_one():
    sizes = hidden, inner, layers, samples, seq, budget = 256, 1536, 3, 16, 256, 2**29
    # Freed memory goes back to the system at once, or the mark would depend on the allocator.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, "-m", "tests.planning.measured_peak", *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shape = LayerShape(uniform_query_to_kv(hidden // 64, hidden // 128), 64, 64, 64, inner)
    config = ModelConfig("llama", 512, hidden, 64, 64, (shape,) * layers)
    plan = make_plan(config, Run("data=1", "device", samples, seq, budget, "float32"))
    assert plan["device_bytes"] == pytest.approx(int(done.stdout), rel=0.25)
