"""Several runs side by side."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intraslice_jax.commands._output import gibibytes, percent
from intraslice_jax.evaluate.compare import Row
from intraslice_jax.evaluate.plot import plot_rows
from intraslice_jax.progress import duration
from intraslice_jax.report import page
from intraslice_jax.report.run import Key, Perplexity, Run, TaskScore, read_run
from intraslice_jax.report.single import perplexity_number, times

RUNS_ABREAST = 5
"""Columns of runs in a table of tasks; further runs get a table of their own."""


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Runs by the sparsity that was asked for, then by method and preset; none has another's name.

    Raises:
        InputError: a folder is no run.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    distinct = [
        dataclasses.replace(run, name=folder) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]
    return sorted(distinct, key=lambda run: (_sparsity(run), _method(run), _preset(run), _ratios(run), run.name))


def comparison_page(runs: Sequence[Run], images: dict[str, bytes]) -> str:
    """The HTML of a comparison, its pictures inside."""
    title = f"{len(runs)} pruning runs"
    parts = [page.heading(title, 1)]
    texts = measured_texts(runs)
    for key, name in texts.items():
        parts += [page.heading(f"Perplexity, {name}"), page.table(_perplexity_rows(runs, key))]
        parts += [page.pictures(images, {name: f"Perplexity on {name} over what was removed."})]
    if not texts:
        hint = "No perplexity was measured. Prune with --text FILE, or write the results of `intraslice eval RUN "
        parts.append(page.paragraph(f"{hint}--output RUN/NAME.json` into the runs.", "note"))
    if any(run.tasks for run in runs):
        parts.append(page.heading("Tasks"))
        parts += [page.table(_task_rows(runs[i : i + RUNS_ABREAST])) for i in range(0, len(runs), RUNS_ABREAST)]
    if any("samples" in run.report for run in runs):
        parts += [page.heading("Sample texts"), page.table(_sample_rows(runs), prose=True)]
    parts += [page.heading("Runs"), page.table(_run_rows(runs))]
    commands = {run.name: run.report["command"] for run in runs if "command" in run.report}
    parts += [page.heading("The same again")] if commands else []
    for name, command in commands.items():
        parts += [page.paragraph(name, "note"), page.code(command)]
    return page.page(title, parts)


def comparison_facts(runs: Sequence[Run]) -> dict[str, Any]:
    """The same as JSON."""
    texts = measured_texts(runs)
    return {
        "runs": [
            {
                "name": run.name,
                "model": run.report.get("model"),
                "method": run.report.get("method"),
                "preset": run.report.get("settings", {}).get("preset"),
                "sparsity": run.report.get("sparsity"),
                "removed_block_fraction": run.report["removed_block_fraction"],
                "removed_model_fraction": run.report["removed_model_fraction"],
                "perplexities": [
                    {"text": texts[found.key], "sequence_length": found.sequence_length}
                    | {"dense": found.dense, "pruned": found.pruned}
                    for found in run.perplexities
                ],
            }
            for run in runs
        ]
    }


def measured_texts(runs: Sequence[Run]) -> dict[Key, str]:
    """What to call each text, with its length where a name would stand for two."""
    found = {p.key: p for run in runs for p in run.perplexities}
    names = [p.text for p in found.values()]
    return {
        key: p.text if names.count(p.text) == 1 else f"{p.text} ({p.evaluated_tokens:,} tokens, windows of {key[1]})"
        for key, p in found.items()
    }


def draw_comparison(runs: Sequence[Run]) -> dict[str, bytes] | None:
    """A PNG per text: perplexity over the removed fraction; None if matplotlib is not installed."""
    images = {}
    for key, name in measured_texts(runs).items():
        image = io.BytesIO()
        if not plot_rows(_points(runs, key), name, image):
            return None
        images[name] = image.getvalue()
    return images


def _points(runs: Sequence[Run], key: Key) -> list[Row]:
    """The runs as the lines of `compare`, whose picture is the same."""
    rows = []
    several_models = len({_model(run) for run in runs}) > 1
    for run in runs:
        found = _measured(run, key)
        if found is None:
            continue
        removed = run.report["removed_block_fraction"], run.report["removed_model_fraction"]
        label = ", ".join(filter(None, (_method(run), _preset(run), _model(run) if several_models else "")))
        rows.append(Row(label, _ratios(run), 0.0, *removed, found.pruned, found.evaluated_tokens, 0.0, 0.0))
        if found.dense is not None and not several_models:
            rows.append(Row("dense", "", 0.0, 0.0, 0.0, found.dense, found.evaluated_tokens, 0.0, 0.0))
    return rows


def _measured(run: Run, key: Key) -> Perplexity | None:
    return next((p for p in run.perplexities if p.key == key), None)


def _sparsity(run: Run) -> float:
    """What was asked for; of reports that do not say so, what went."""
    return run.report.get("sparsity", run.report["removed_block_fraction"])


def _model(run: Run) -> str:
    return Path(run.report.get("model", "")).name


def _method(run: Run) -> str:
    return run.report.get("method", "intraslice")


def _preset(run: Run) -> str:
    return run.report.get("settings", {}).get("preset", "")


def _ratios(run: Run) -> str:
    return run.report.get("settings", {}).get("prune", {}).get("ratios", "")


def _what(run: Run) -> list[str]:
    """What tells a run from the others."""
    return [run.name, _method(run), _preset(run) or "-", _ratios(run) or "-", percent(_sparsity(run))]


WHAT = ["run", "method", "preset", "ratios", "asked"]


def _perplexity_rows(runs: Sequence[Run], key: Key) -> list[list[str]]:
    rows = [[*WHAT, "removed", "dense", "pruned", "change"]]
    for run in runs:
        found = _measured(run, key)
        if found is not None:
            numbers = perplexity_number(found.dense), perplexity_number(found.pruned), times(found)
            rows.append([*_what(run), percent(run.report["removed_block_fraction"]), *numbers])
    return rows


def _run_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [[*WHAT, "model", "of all its parameters", "calibration", "time", "peak memory"]]
    for run in runs:
        report = run.report
        rows.append(
            [
                *_what(run),
                _model(run) or "-",
                percent(report["removed_model_fraction"]),
                f"{report.get('calibration_samples', '-')} x {report.get('calibration_sequence_length', '-')}",
                duration(report["seconds"]) if "seconds" in report else "-",
                gibibytes(report["peak_rss_bytes"]) if "peak_rss_bytes" in report else "-",
            ]
        )
    return rows


def _sample_rows(runs: Sequence[Run]) -> list[list[str]]:
    """For every prompt the dense model's continuation, then those of the runs."""
    rows = [["prompt", "model", "continuation"]]
    samples = [(run, sample) for run in runs for sample in run.report.get("samples", [])]
    for prompt in dict.fromkeys(sample["prompt"] for _, sample in samples):
        of_prompt = [(run, sample) for run, sample in samples if sample["prompt"] == prompt]
        dense = dict.fromkeys((_model(run), sample["dense"]) for run, sample in of_prompt)
        rows += [[prompt, f"{model}, dense", text] for model, text in dense]
        rows += [[prompt, run.name, sample["pruned"]] for run, sample in of_prompt]
    return rows


def _task_rows(runs: Sequence[Run]) -> list[list[str]]:
    names = dict.fromkeys((score.task, score.metric) for run in runs for score in run.tasks)
    rows = [["task", "metric", "dense", *(run.name for run in runs)]]
    for task, metric in names:
        scores = [[s for s in run.tasks if (s.task, s.metric) == (task, metric)] for run in runs]
        dense = next((s for of_run in scores for s in of_run if s.dense is not None), None)
        rows.append([task, metric, _score(dense, "dense"), *(_score(next(iter(s), None), "pruned") for s in scores)])
    return rows


def _score(score: TaskScore | None, which: str) -> str:
    value = None if score is None else getattr(score, which)
    if value is None:
        return "-"
    return f"{value[0]:.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}")
