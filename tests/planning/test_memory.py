"""The planned peak against that of a real run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intraslice_jax.config import LayerShape, ModelConfig, uniform_query_to_kv
from intraslice_jax.planning.plan import Run, make_plan
from tests.allocator import FREED_AT_ONCE

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_the_peak_is_the_measured_one():
    sizes = hidden, inner, layers, samples, seq, budget = 256, 1536, 3, 16, 256, 2**29
    command, environment = [sys.executable, "-m", "tests.planning.measured_peak"], os.environ | FREED_AT_ONCE
    command += map(str, sizes)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shape = LayerShape(uniform_query_to_kv(hidden // 64, hidden // 128), 64, 64, 64, inner)
    config = ModelConfig("llama", 512, hidden, 64, 64, (shape,) * layers)
    plan = make_plan(config, Run("data=1", "device", samples, seq, budget, "float32"))
    assert plan["device_bytes"] == pytest.approx(int(done.stdout), rel=0.25)
