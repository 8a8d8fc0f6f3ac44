"""The command, killed and continued."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import intraslice_jax as isl
from intraslice_jax import api
from intraslice_jax.cli import main
from intraslice_jax.io import journal
from intraslice_jax.io.journal import Journal
from intraslice_jax.models.decoder import decoder_to_arrays
from tests.conftest import ROOT
from tests.tiny import tiny_text, write_tiny_llama

LAYERS = 6
SMALL = ("--preset", "fast", "--samples", "4", "--sequence-length", "64", "--align", "2", "--sparsity", "0.25")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The arguments of a run of a tiny model, but for its output."""
    folder = tmp_path_factory.mktemp("source")
    model = write_tiny_llama(folder / "model", num_hidden_layers=LAYERS)
    (folder / "text.txt").write_text(tiny_text())
    return [str(model), "--calibration", str(folder / "text.txt"), *SMALL]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    # A job that is queued again and again has one command, so there may be nothing to resume.
    assert main(["prune", *options, "-o", str(out), "--resume"]) == 0
    return out


def run_until(layer: int, signal_number: int, arguments: list[str]) -> tuple[int, list[str]]:
    """Starts `prune`, sends it a signal once it has told about that layer; exit code and standard error."""
    command = [sys.executable, "-m", "intraslice_jax", "prune", *arguments]
    lines = []
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                lines.append(line)
                if line.startswith(f"[{layer + 1}/"):
                    process.send_signal(signal_number)
                    break
            lines += process.stderr.read().splitlines()
            return process.wait(timeout=60), lines
        finally:
            process.kill()


def assert_same_bits(found: Path, expected: Path) -> None:
    one, two = isl.load(found), isl.load(expected)
    assert one.config == two.config
    arrays = decoder_to_arrays(one.decoder)
    for name, array in decoder_to_arrays(two.decoder).items():
        assert np.asarray(arrays[name]).tobytes() == np.asarray(array).tobytes(), name


def layers_told(capsys) -> list[int]:
    return [int(n) - 1 for n in re.findall(r"^\[(\d+)/", capsys.readouterr().err, re.MULTILINE)]


def test_killed_at_a_random_layer(options, uninterrupted, tmp_path, capsys):
    out, kept = tmp_path / "out", tmp_path / "out.journal"
    layer = int(np.random.default_rng().integers(1, LAYERS - 1))
    code, lines = run_until(layer, signal.SIGKILL, [*options, "-o", str(out)])
    assert code == -signal.SIGKILL, lines
    assert not out.exists()
    assert kept.is_dir()
    # By itself nothing is continued, and nothing lost.
    (kept / "lock").unlink()  # the next run takes it over, and away when it ends
    before = sorted(kept.rglob("*"))
    assert main(["prune", *options, "-o", str(out)]) == 2
    assert re.search(r"out\.journal is of an interrupted run.*--resume.*--overwrite", capsys.readouterr().err)
    assert main(["prune", *options, "-o", str(out), "--resume", "--sparsity", "0.5"]) == 2
    assert "prune.sparsity was 0.25, now it is 0.5" in capsys.readouterr().err
    assert sorted(kept.rglob("*")) == before
    assert main(["prune", *options, "-o", str(out), "--resume"]) == 0
    told = layers_told(capsys)
    assert told == list(range(told[0], LAYERS))
    assert told[0] in range(layer - 1, layer + 3), layer  # layers are written while the next ones compute
    assert_same_bits(out, uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    reports = [json.loads((path / "report.json").read_text())["layers"] for path in (out, uninterrupted)]
    assert [{**layer, "seconds": 0} for layer in reports[0]] == [{**layer, "seconds": 0} for layer in reports[1]]


def test_terminated(options, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    code, lines = run_until(2, signal.SIGTERM, [*options, "-o", str(out)])
    assert code == 1
    said = [line for line in lines if not line.startswith("[")]
    assert len(said) == 1, said
    assert "interrupted" in said[0]
    assert f"the same command with --resume goes on from {out}.journal" in said[0]
    # Another residency continues the same run.
    assert main(["prune", *options, "-o", str(out), "--resume", "--residency", "disk"]) == 0
    assert layers_told(capsys)[0] >= 3  # a signal lets the layer that is being written be finished
    assert_same_bits(out, uninterrupted)


def test_a_full_disk_while_the_checkpoint_is_written(options, uninterrupted, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(api, "save", full)
        assert main(["prune", *options, "-o", str(out)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(said) == 1, said
    assert "No space left on device" in said[0]
    assert "--resume" in said[0]
    assert main(["prune", *options, "-o", str(out), "--resume"]) == 0
    assert layers_told(capsys) == []  # all layers were there
    assert_same_bits(out, uninterrupted)


def test_a_full_disk_while_the_journal_is_written(options, uninterrupted, tmp_path, capsys, monkeypatch):
    save, calls = journal.ocp.save, []

    def full(path, *args, **named):
        calls.append(path)
        if len(calls) > 4:
            raise ValueError(f"RESOURCE_EXHAUSTED: writing {path}: No space left on device [os_error_code='28']")
        return save(path, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(journal.ocp, "save", full)
        assert main(["prune", *options, "-o", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(said) == 1, said
    for part in ("layers/00002 cannot be written: no space left on device", "is intact", "--resume goes on from"):
        assert part in said[0]
    assert [path.name for path in sorted((tmp_path / "out.journal" / "streams").iterdir())] == ["00000", "00001"]
    # Overwriting starts at the beginning.
    assert main(["prune", *options, "-o", str(tmp_path / "out"), "--overwrite"]) == 0
    assert layers_told(capsys) == list(range(LAYERS))
    assert_same_bits(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("given", [["--resume"], ["--residency", "disk"]])
def test_options_that_need_the_journal(options, tmp_path, capsys, given):
    assert main(["prune", *options, "-o", str(tmp_path / "out"), "--no-journal", *given]) == 2
    assert "leave out --no-journal" in capsys.readouterr().err


def test_residency_does_not_change_a_bit(options, uninterrupted, tmp_path):
    out = tmp_path / "out"
    assert main(["prune", *options, "-o", str(out), "--residency", "disk"]) == 0
    assert_same_bits(out, uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_a_real_model_killed_and_resumed(smollm2_gguf, calibration_texts, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text((calibration_texts / "wiki.utf8").read_text(encoding="utf-8")[:20000], encoding="utf-8")
    small = ("--preset", "fast", "--samples", "2", "--sequence-length", "128")
    arguments = [str(smollm2_gguf), "--calibration", str(text), *small]
    # Two runs that are both stopped behind layer 2, one of them before, too: a whole run would take minutes.
    for name, stops in {"one": [1, 2], "other": [2]}.items():
        for layer in stops:
            code, lines = run_until(layer, signal.SIGKILL, [*arguments, "-o", str(tmp_path / name), "--resume"])
            assert code == -signal.SIGKILL, lines
            assert any("going on behind layer" in line for line in lines) == (layer != stops[0])
    journals = [Journal(tmp_path / f"{name}.journal") for name in ("one", "other")]
    for each in journals:
        run = json.loads((tmp_path / "one.journal" / "run.json").read_text())["content"]
        each.begin({name: value for name, value in run.items() if name != "version"})
    for layer in range(2):
        (one, facts), (other, expected) = (each.layer(layer, dict[str, Any]) for each in journals)
        assert {**facts["record"], "seconds": 0} == {**expected["record"], "seconds": 0}
        assert set(one) == set(other)
        for name in other:
            assert one[name].tobytes() == other[name].tobytes(), (layer, name)
