"""Every notebook runs from its first to its last cell, and holds small outputs with pictures."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    runner = ROOT / "tests" / "notebooks" / "run_notebook.py"
    # Users have neither strict promotion nor warnings as errors.
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_PROMOTION")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, runner, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    assert path.stat().st_size < 300_000
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert str(ROOT) not in path.read_text("utf-8")
