"""One output, one run: the second one ends at once and says who has it."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from intraslice_jax.errors import InputError
from intraslice_jax.io.lock import Lock, locked
from tests.conftest import ROOT
from tests.tiny import tiny_text, write_tiny_llama


def test_two_runs_started_together(tmp_path):
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(tiny_text())
    small = ["--preset", "fast", "--samples", "2", "--sequence-length", "32", "--align", "2"]
    command = ["prune", str(model), "-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "text.txt"), *small]
    started = time.monotonic()
    both, errors, seconds = [], {}, {}
    for more in ([], ["--overwrite"]):
        with open(tmp_path / f"log{len(both)}", "w") as log:
            given = [sys.executable, "-m", "intraslice_jax", *command, *more]
            both.append(subprocess.Popen(given, cwd=ROOT, stderr=log, stdout=subprocess.DEVNULL))
    while len(seconds) < 2:
        for i, process in enumerate(both):
            if process.pid not in seconds and process.poll() is not None:
                seconds[process.pid] = time.monotonic() - started
                errors[process.pid] = (tmp_path / f"log{i}").read_text()
        time.sleep(0.05)
    won, lost = sorted(both, key=lambda process: process.returncode)
    assert (won.returncode, lost.returncode) == (0, 2), errors
    assert len(errors[lost.pid].splitlines()) == 1, errors
    who = f"process {won.pid} on host {re.escape(socket.gethostname())}"
    assert re.search(f"out is in use by another run, {who}; wait for it, or choose another", errors[lost.pid])
    assert "--overwrite" not in errors[lost.pid]
    assert seconds[lost.pid] < seconds[won.pid]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log0", "log1", "model", "out", "text.txt"]


def written(folder, **changes):
    """The lock of an output that this process wrote before it was killed."""
    with locked(folder / "out"):
        content = json.loads((folder / ".out.lock").read_text())
    (folder / ".out.lock").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("content", [{}, {"host": "another-container"}, {"boot": "before the restart"}, {"pid": "one"}])
def test_the_lock_of_a_process_that_ended_is_taken_over(tmp_path, content):
    written(tmp_path, **content)
    with locked(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_on_another_host_may_be_at_work(tmp_path):
    written(tmp_path, pid=12, host="node7", boot="another machine")
    says = r"out may be in use by another run, process 12 on host node7: .* remove .*/\.out\.lock$"
    with pytest.raises(InputError, match=says), locked(tmp_path / "out"):
        pytest.fail("locked")
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out", resume=True):  # the user says that it has ended
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_files_cannot_be_locked_the_process_is_looked_for(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        written(tmp_path, pid=other.pid)
        monkeypatch.setattr("fcntl.flock", unsupported)
        with pytest.raises(InputError, match=f"in use by another run, process {other.pid} "), locked(tmp_path / "out"):
            pytest.fail("locked")
        other.communicate(b"")
    with locked(tmp_path / "out"):
        pass


def test_what_a_lock_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / ".out.lock").mkdir()
    os.mkfifo(tmp_path / ".pipe.lock")
    for name, says in (
        ("out", "is a folder, expected the file of a lock; remove it"),
        ("pipe", "is not a file, expected that of a lock; remove it"),
        ("file/out", "file is a file; the output must be in a folder"),
        ("x" * 300, "has 300 bytes, the name of an output at most"),
    ):
        with pytest.raises(InputError, match=says), locked(tmp_path / name):
            pytest.fail("locked")


def test_folders_made_for_a_lock_go_with_it_if_nothing_was_written(tmp_path):
    with pytest.raises(InputError, match="wrong"), locked(tmp_path / "a" / "b" / "out"):
        raise InputError("wrong")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_lock_is_its_own(tmp_path):
    one, other = Lock(tmp_path / "lock", tmp_path), Lock(tmp_path / "lock", tmp_path)
    one.take()
    one.take()
    with pytest.raises(InputError, match="in use"):
        other.take()
    other.release()
    assert (tmp_path / "lock").exists()
    one.release()
    other.take()
    other.release()
