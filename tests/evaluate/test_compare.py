"""Comparisons: what is planned, what survives a failure, and the command from end to end."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml

from intraslice_jax.cli import main
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate import compare as comparison
from intraslice_jax.evaluate.compare import compare, plan_trials
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.evaluate.plot import plot_rows
from intraslice_jax.prune.methods import METHODS
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import flavours
from tests.tiny import tiny_text, write_tiny_llama

WINDOWS, HELD_OUT = flavours.windows(4), flavours.windows(3, seed=9)
SETTINGS = PruneConfig(align=1)


def test_trials_are_all_combinations_once():
    trials = plan_trials(["obs", "flap+biases", "slicegpt", "obs"], [0.2, 0.4, 0.2], ["uniform", "fisher"], SETTINGS)
    found = [(t.method, t.config.method, t.config.sparsity, t.ratios, t.config.output_biases) for t in trials]
    assert found == [
        ("obs", "obs", 0.2, "uniform", False),
        ("obs", "obs", 0.2, "fisher", False),
        ("obs", "obs", 0.4, "uniform", False),
        ("obs", "obs", 0.4, "fisher", False),
        ("flap+biases", "flap", 0.2, "uniform", True),
        ("flap+biases", "flap", 0.2, "fisher", True),
        ("flap+biases", "flap", 0.4, "uniform", True),
        ("flap+biases", "flap", 0.4, "fisher", True),
        ("slicegpt", "slicegpt", 0.2, "", False),
        ("slicegpt", "slicegpt", 0.4, "", False),
    ]
    assert all(trial.config.align == 1 for trial in trials)


@pytest.mark.parametrize(
    ("methods", "sparsities", "ratios", "says"),
    [
        (["flop"], [0.2], ["uniform"], "no method 'flop'; did you mean 'flap'"),
        (["flap+bias"], [0.2], ["uniform"], "no method 'flap.bias'"),
        (["flap+biasesx"], [0.2], ["uniform"], "no method 'flap.biasesx'"),
        (["slicegpt+biases"], [0.2], ["uniform"], "no method 'slicegpt.biases'"),
        (["obs"], [1.2], ["uniform"], "sparsity must be in"),
        (["obs"], [0.2], ["fishr"], "did you mean 'fisher'"),
        ([], [0.2], ["uniform"], "methods is empty"),
        (["obs"], [], ["uniform"], "sparsity is empty"),
        (["obs"], [0.2], [], "ratios is empty"),
    ],
)
def test_a_wrong_plan_is_refused(methods, sparsities, ratios, says):
    with pytest.raises(InputError, match=says):
        plan_trials(methods, sparsities, ratios, SETTINGS)


def test_rows_are_what_single_runs_give():
    model = flavours.make("gqa")
    trials = plan_trials(["magnitude"], [0.3], ["uniform", "fisher"], SETTINGS)
    seen = []
    rows = compare(model, WINDOWS, HELD_OUT, trials, seen.append)
    assert seen == rows
    assert rows[0].method == "dense"
    assert rows[0].perplexity == pytest.approx(perplexity(model, HELD_OUT).perplexity)
    for row, trial in zip(rows[1:], trials, strict=True):
        alone = prune_model(model, WINDOWS, trial.config)
        assert (row.method, row.ratios, row.sparsity) == (trial.method, trial.ratios, 0.3)
        assert row.perplexity == pytest.approx(perplexity(alone, HELD_OUT).perplexity, rel=1e-5)
        assert row.removed_block_fraction == alone.report["removed_block_fraction"]
        assert row.removed_model_fraction == alone.report["removed_model_fraction"]
        assert row.evaluated_tokens == HELD_OUT.size - len(HELD_OUT)
        assert row.prune_seconds > 0


def test_scores_are_estimated_once_for_all_sparsities(monkeypatch):
    calls = []
    find = comparison.find_estimator

    def counted(name):
        def estimator(*args):
            calls.append(name)
            return find(name)(*args)

        return estimator

    monkeypatch.setattr(comparison, "find_estimator", counted)
    trials = plan_trials(["magnitude"], [0.2, 0.4], ["fisher"], SETTINGS)
    calls.clear()
    rows = compare(flavours.make("gqa"), WINDOWS, HELD_OUT, trials)
    assert calls == ["fisher"]
    assert rows[1].removed_block_fraction < rows[2].removed_block_fraction


class Broken:
    """A method that fails in the middle."""

    def prune_attention(self, layer, ratio):
        raise ZeroDivisionError("nothing\nto divide by")

    def prune_mlp(self, layer, keep):
        raise NotImplementedError


def test_a_failure_costs_only_its_own_row(monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    trials = plan_trials(["broken", "slicegpt", "flap"], [0.3], ["uniform"], SETTINGS)
    rows = compare(flavours.make("phi"), WINDOWS, HELD_OUT, trials)
    assert [row.method for row in rows] == ["dense", "broken", "slicegpt", "flap"]
    assert rows[1].error == "nothing to divide by"
    assert rows[1].perplexity is None
    assert "parallel blocks" in rows[2].error
    assert rows[3].error == ""
    assert np.isfinite(rows[3].perplexity)


def test_csv_has_a_line_per_row():
    rows = compare(flavours.make("phi"), WINDOWS, HELD_OUT, plan_trials(["slicegpt"], [0.3], ["uniform"], SETTINGS))
    lines = list(csv.DictReader(comparison.to_csv(rows).splitlines()))
    assert [line["method"] for line in lines] == ["dense", "slicegpt"]
    assert float(lines[0]["perplexity"]) == rows[0].perplexity
    assert lines[1]["perplexity"] == ""
    assert lines[1]["error"] == rows[1].error


def row(method, sparsity, value, error=""):
    return comparison.Row(method, "uniform", sparsity, sparsity, sparsity, value, 10, 1.0, 1.0, error)


def test_plot(tmp_path):
    rows = [row("dense", 0.0, 20.0), row("obs", 0.3, 30.0), row("obs", 0.2, 25.0), row("flap", 0.2, None, "failed")]
    assert plot_rows([*rows, row("magnitude", 0.5, float("inf"))], "a title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(tiny_text())
    return folder


def arguments(source, out):
    text = str(source / "text.txt")
    return [
        *("compare", str(source / "model"), "-o", str(out), "--calibration", text, "--text", text),
        *("--samples", "3", "--sequence-length", "32", "--windows", "2", "--align", "2"),
    ]


def test_command(source, tmp_path, capsys):
    out = tmp_path / "out"
    chosen = ["--methods", "intraslice,flap+biases", "--methods", "slicegpt", "--sparsity", "0.3,0.3"]
    assert main([*arguments(source, out), *chosen]) == 0
    said = capsys.readouterr()
    table = said.out.splitlines()
    assert table[0].split() == ["method", "ratios", "asked", "removed", "of", "model", "perplexity", "seconds"]
    methods = ["dense", "intraslice", "flap+biases", "slicegpt"]
    assert [line.split()[0] for line in table[1:]] == methods
    assert "[4/4] slicegpt 0.3: perplexity" in said.err
    report = json.loads((out / "compare.json").read_text())
    assert [r["method"] for r in report["rows"]] == methods
    assert report["settings"]["calibrate"]["samples"] == 3
    assert report["evaluation_windows"] == 2
    assert (out / "compare.csv").read_text().count("\n") == 5
    assert (out / "compare.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # The settings of a run are a configuration for the next, lists and all.
    settings = report["settings"] | {"output": str(tmp_path / "again"), "sparsity": [0.3], "methods": "intraslice"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    assert main(["compare", "--config", str(tmp_path / "again.yaml")]) == 0
    again = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert [r["perplexity"] for r in again["rows"]] == [r["perplexity"] for r in report["rows"][:2]]


def test_command_with_a_failing_method(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    out = tmp_path / "out"
    assert main([*arguments(source, out), "--methods", "broken,magnitude", "--sparsity", "0.3"]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["method", "dense", "broken", "magnitude"]
    assert "failed" in said.out.splitlines()[2]
    assert said.err.splitlines()[-1].startswith("intraslice compare: 1 of 2 failed")
    assert "nothing to divide by" in said.err.splitlines()[-1]
    assert "matplotlib is not installed" in said.err
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.json"]
    assert json.loads((out / "compare.json").read_text())["rows"][1]["error"] == "nothing to divide by"


def test_an_interrupted_comparison_leaves_its_rows(source, tmp_path, monkeypatch):
    class Interrupted(Broken):
        def prune_attention(self, layer, ratio):
            raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "broken", Interrupted)
    out = tmp_path / "out"
    assert main([*arguments(source, out), "--methods", "magnitude,broken", "--sparsity", "0.3"]) == 1
    assert not out.exists()
    rows = json.loads((tmp_path / "out.partial.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["dense", "magnitude"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--methods", "flop"], "did you mean 'flap'"),
        (["--sparsity", "much"], "could not convert string to float: 'much'"),
        (["--sparsity", "0.2,1.0"], "sparsity must be in [0, 1), found 1.0"),
        (["--dataset", "wikitext2"], "give either --text FILE or --dataset NAME"),
    ],
)
def test_command_refuses_wrong_input(source, tmp_path, capsys, given, says):
    assert main([*arguments(source, tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


def test_command_takes_methods_not_a_method(source, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("prune:\n  method: flap\n")
    assert main([*arguments(source, tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "compare takes several, as --methods at the top" in capsys.readouterr().err
