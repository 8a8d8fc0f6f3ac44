"""The planned peak against that of a real run in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig, uniform_query_to_kv
from intraslice_jax.planning.plan import Run, make_plan
from tests.allocator import FREED_AT_ONCE

ROOT = Path(__file__).resolve().parent.parent.parent


LOOP, GRADIENTS, REFINEMENT = (256, 1536, 2, 16, 256), (256, 1024, 3, 12, 128), (512, 512, 2, 4, 32)
"""Width, MLP channels, layers, windows and their tokens: each so that its phase is the run's peak."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
@pytest.mark.parametrize(
    ("sizes", "settings", "phase"),
    [
        (LOOP, {}, "MLP solve"),
        (GRADIENTS, {"ratios": "fisher"}, "gradients"),
        (REFINEMENT, {"refine": 1}, "refinement"),
    ],
)
def test_the_peak_is_the_measured_one(sizes, settings, phase):
    command, environment = [sys.executable, "-m", "tests.planning.measured_peak"], os.environ | FREED_AT_ONCE
    command += [json.dumps(sizes), json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    hidden, inner, layers, samples, seq = sizes
    shape = LayerShape(uniform_query_to_kv(hidden // 64, hidden // 128), 64, 64, 64, inner)
    config = ModelConfig("llama", 512, hidden, 64, 64, (shape,) * layers)
    plan = make_plan(config, Run("data=1", "device", samples, seq, PruneConfig().memory_budget, "float32", **settings))
    assert plan["peak_phase"] == phase
    assert plan["device_bytes"] == pytest.approx(int(done.stdout), rel=0.25)
