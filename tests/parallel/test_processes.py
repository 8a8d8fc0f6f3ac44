"""Several processes on this machine, connected by gloo."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from intraslice_jax import api
from intraslice_jax.cli import main
from intraslice_jax.config import ParallelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.parallel import distributed
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make, windows
from tests.tiny import tiny_text, write_tiny_llama

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(command: list[str], devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes)


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


LAYERS = 3
"""One more than are on the devices at once where layers are streamed."""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A command but for its output."""
    folder = tmp_path_factory.mktemp("source")
    model = write_tiny_llama(folder / "model", num_hidden_layers=LAYERS)
    (folder / "text").write_text(tiny_text())
    return [
        *("prune", str(model), "--calibration", str(folder / "text"), "--samples", "10"),
        *("--sequence-length", "32", "--align", "1", "--preset", "fast", "--output"),
    ]


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert main([*options, str(out)]) == 0
    return out


def start_two(options: list[str]) -> list[subprocess.Popen]:
    peers = ["--num-processes", "2", "--coordinator", f"localhost:{free_port()}", "--process-id"]
    return [start(["-m", "intraslice_jax", *options, *peers, str(i)], devices=4) for i in range(2)]


def assert_same_model(found: Path, expected: Path) -> None:
    one, two = api.restore(expected), api.restore(found)
    assert two.config == one.config
    arrays = decoder_to_arrays(two.decoder)
    for name, array in decoder_to_arrays(one.decoder).items():
        np.testing.assert_allclose(arrays[name], array, atol=5e-5 * np.abs(np.asarray(array)).max())
    reports = [json.loads((folder / "report.json").read_text()) for folder in (expected, found)]
    heads = [[layer["kept_heads"] for layer in report["layers"]] for report in reports]
    assert heads[0] == heads[1]


@pytest.mark.slow
def test_two_processes_killed_and_continued_write_the_checkpoint_of_one(options, one, tmp_path):
    """Killed with all layers on the devices, continued with each process's parts of them in host memory."""
    options = [*options, str(tmp_path / "two"), "--resume"]
    killed = start_two(options)
    assert killed[0].stderr is not None
    assert any(line.startswith(f"[1/{LAYERS}]") for line in killed[0].stderr)
    for process in killed:
        process.kill()
    finish(killed)
    assert [path.name for path in (tmp_path / "two.journal" / "streams").glob("0*")] == ["00000"]
    together = finish(start_two([*options, "--residency", "host"]))
    for code, _, errors in together:
        assert code == 0, errors
    assert "going on behind layer 0" in together[0][2]
    assert "removed" in together[0][1]
    # Only the first speaks, and the library that connects them, whose threads fall into each other's lines.
    gloo = r"\[Gloo\]|Rank|is connected to|peer ranks( is)?|Expected number of connected|[\d\s.:]"
    assert re.sub(gloo, "", together[1][1]) == ""
    assert "layer 0" not in together[1][2]
    assert_same_model(tmp_path / "two", one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two"]  # no partial folder


def peer(port: int, number: int, fate: str) -> subprocess.Popen:
    return start(["-m", "tests.parallel.peers", str(port), str(number), fate])


@pytest.mark.parametrize(
    ("fate", "code", "message"),
    [("die", -9, "process 1 gave no sign of life for 3 s"), ("fail", 2, "process 1 failed: the text is gone")],
)
def test_a_process_that_is_lost(fate, code, message):
    port = free_port()
    first, second = finish([peer(port, 0, "wait"), peer(port, 1, fate)], timeout=100)
    assert second[0] == code
    assert first[0] == 1
    assert message in first[2]


def test_a_process_that_never_comes():
    ((code, output, errors),) = finish([peer(free_port(), 0, "alone")], timeout=100)
    assert code == 1
    assert "started" not in output
    assert "after 2 s not all of 2 processes at localhost" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "localhost:1"}, "`coordinator` without `num_processes`, `process_id`"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "`process_id=2` is not below"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        distributed.start(ParallelConfig(**options))


def test_no_cluster_is_found():
    command = ["-m", "intraslice_jax", "prune", "model", "-o", "out", "--distributed"]
    ((code, _, errors),) = finish([start(command)])
    assert code == 2
    assert "no TPU pod slice, Slurm or Open MPI job was detected" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("options", [{"coordinator": "here"}, {"peer_timeout": 0}])
def test_options_out_of_range(options):
    with pytest.raises(InputError):
        ParallelConfig(**options)


def test_more_processes_than_sequences(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    with pytest.raises(InputError, match="3 processes cannot share 2 calibration windows"):
        prune_model(make("gqa"), windows(2), PruneConfig())
