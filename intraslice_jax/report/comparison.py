"""Several runs side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intraslice_jax.commands._output import gibibytes, percent
from intraslice_jax.evaluate.compare import Row
from intraslice_jax.evaluate.plot import plot_rows
from intraslice_jax.progress import duration
from intraslice_jax.report import page
from intraslice_jax.report.run import Perplexity, Run, TaskScore

Key = tuple[str, int, int]


def comparison_page(runs: Sequence[Run], images: dict[str, bytes]) -> str:
    """The HTML of a comparison, its pictures inside."""
    texts = measured_texts(runs)
    title = f"{len(runs)} pruning runs"
    parts = [page.heading(title, 1), page.heading("Runs"), page.table(_run_rows(runs, texts))]
    if not texts:
        hint = "No perplexity was measured. Prune with --text FILE, or write the results of `intraslice eval RUN "
        parts.append(page.paragraph(f"{hint}--output RUN/NAME.json` into the runs.", "note"))
    captions = {name: f"Perplexity on {name} over what was removed." for name in images}
    parts += [page.pictures(images, captions)]
    if any(run.tasks for run in runs):
        parts += [page.heading("Tasks"), page.table(_task_rows(runs))]
    commands = "\n".join(run.report["command"] for run in runs if "command" in run.report)
    parts += [page.heading("The same again"), page.code(commands)] if commands else []
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
        if not plot_rows(_rows(runs, key), name, image):
            return None
        images[name] = image.getvalue()
    return images


def _rows(runs: Sequence[Run], key: Key) -> list[Row]:
    """The runs as the lines of `compare`, whose picture is the same."""
    rows = []
    for run in runs:
        found = next((p for p in run.perplexities if p.key == key), None)
        if found is None:
            continue
        ratios = str(run.report.get("settings", {}).get("prune", {}).get("ratios", ""))
        method = str(run.report.get("method", "intraslice"))
        removed = run.report["removed_block_fraction"], run.report["removed_model_fraction"]
        label = f"{method}, {Path(str(run.report['model'])).name}" if _models(runs) > 1 else method
        rows.append(Row(label, ratios, 0.0, *removed, found.pruned, found.evaluated_tokens, 0.0, 0.0))
        if found.dense is not None and _models(runs) == 1:
            rows.append(Row("dense", "", 0.0, 0.0, 0.0, found.dense, found.evaluated_tokens, 0.0, 0.0))
    return rows


def _models(runs: Sequence[Run]) -> int:
    return len({str(run.report.get("model")) for run in runs})


def _run_rows(runs: Sequence[Run], texts: dict[Key, str]) -> list[list[str]]:
    head = ["run", "model", "method", "ratios", "removed", "of model"]
    rows = [[*head, *(f"perplexity, {name}" for name in texts.values()), "calibration", "time", "peak memory"]]
    for run in sorted(runs, key=lambda run: run.report["removed_block_fraction"]):
        report = run.report
        found = {p.key: p for p in run.perplexities}
        rows.append(
            [
                run.name,
                Path(str(report.get("model", ""))).name,
                str(report.get("method", "")),
                str(report.get("settings", {}).get("prune", {}).get("ratios", "-")),
                percent(report["removed_block_fraction"]),
                percent(report["removed_model_fraction"]),
                *(_perplexity(found.get(key)) for key in texts),
                f"{report.get('calibration_samples')} x {report.get('calibration_sequence_length')}",
                duration(report["seconds"]) if "seconds" in report else "-",
                gibibytes(report["peak_rss_bytes"]) if "peak_rss_bytes" in report else "-",
            ]
        )
    return rows


def _perplexity(found: Perplexity | None) -> str:
    if found is None or found.pruned is None:
        return "-"
    return f"{found.pruned:.2f}" if found.dense is None else f"{found.pruned:.2f} (dense {found.dense:.2f})"


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
