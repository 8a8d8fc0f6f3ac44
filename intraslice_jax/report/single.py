"""The page of one run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intraslice_jax.commands._output import gibibytes, number, percent
from intraslice_jax.progress import duration
from intraslice_jax.report import page
from intraslice_jax.report.run import Perplexity, Run, TaskScore, read_run
from intraslice_jax.report.write import draw, write_page

CAPTIONS = {
    "ratios": "What each layer lost of its attention and MLP parameters; dotted: what was asked of its channels.",
    "heads": "Which query heads stayed.",
    "spectra": "Share of each principal component in the energy of a layer's values, mean over its KV heads; "
    "red: the cut.",
    "spectra-by-layer": "The same for some layers, KV head by KV head.",
    "errors": "Error that each module's output has on the calibration text, relative to its energy.",
    "time": "Seconds that each layer took; the first of each shape are compiled.",
}


def write_report(folder: str | Path, into: str | Path | None = None) -> bool:
    """Writes `report.html` and `pictures/*.png` of a run.

    Args:
        folder: the run's.
        into: another folder for the page, None for the run's own.

    Returns:
        False if matplotlib is not installed; then the page has its tables and no pictures.

    Raises:
        InputError: the folder is no run.
    """
    run = read_run(folder)
    images = draw(run.report)
    write_page(folder if into is None else into, run_page(run, images or {}), images or {})
    return images is not None


def run_page(run: Run, images: Mapping[str, bytes]) -> str:
    """The HTML of a run, its pictures inside."""
    report = run.report
    title = f"{_model(report)}, pruned by {report.get('method', 'intraslice')}"
    parts = [page.heading(title, 1), page.paragraph(_calibration(report), "note"), page.cards(_cards(run))]
    if run.perplexities:
        parts += [page.heading("Perplexity"), page.table(perplexity_rows(run))]
        losses = loss_rows(run)
        parts += [page.folded("Loss by position", page.table(losses))] if len(losses) > 1 else []
    if run.tasks:
        parts += [page.heading("Tasks"), page.table(task_rows(run.tasks))]
    if report.get("samples"):
        parts += [page.heading("Sample texts"), page.table(sample_rows(report["samples"]), prose=True)]
    parts += [page.heading("Layers"), page.pictures(images, CAPTIONS)]
    parts += [page.folded("Every layer in numbers", page.table(_layer_rows(report)))]
    parts += [page.heading("Time and memory"), page.table(_stage_rows(report))]
    if "command" in report:
        parts += [page.heading("The same again"), page.code(report["command"])]
    settings = json.dumps(report.get("settings", {}), indent=2)
    parts += [page.folded("All settings", page.code(settings))]
    parts += [
        page.folded("Versions", page.table([["library", "version"], *map(list, report.get("versions", {}).items())]))
    ]
    return page.page(title, parts)


def perplexity_rows(run: Run) -> list[list[str]]:
    """A line per text."""
    rows = [["text", "length", "tokens", "dense", "pruned", "change"]]
    for found in run.perplexities:
        counts = number(found.sequence_length), number(found.evaluated_tokens)
        rows.append(
            [found.text, *counts, perplexity_number(found.dense), perplexity_number(found.pruned), times(found)]
        )
    return rows


def loss_rows(run: Run) -> list[list[str]]:
    """A line per text and band of positions, of those that have been measured on both models."""
    rows = [["text", "tokens before", "dense", "pruned", "change in nats"]]
    for found in run.perplexities:
        dense, pruned = (found.losses.get(which, {}) for which in ("dense", "pruned"))
        for band in (band for band in dense if band in pruned):
            values = dense[band], pruned[band]
            rows.append([found.text, band, *(f"{value:.3f}" for value in values), f"{values[1] - values[0]:+.3f}"])
    return rows


def perplexity_number(value: float | None) -> str:
    """A perplexity; that of a ruined model in a few digits."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1e6 else f"{value:.3g}"


def times(found: Perplexity) -> str:
    """By what a perplexity was multiplied."""
    if found.dense is None or found.pruned is None or math.isinf(found.dense):
        return "-"
    return f"x {perplexity_number(found.pruned / found.dense)}"


def sample_rows(samples: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A line per prompt."""
    return [["prompt", "dense", "pruned"], *([s["prompt"], s["dense"], s["pruned"]] for s in samples)]


def task_rows(tasks: list[TaskScore]) -> list[list[str]]:
    """A line per metric."""

    def cells(value: tuple[float, float | None, int | None] | None) -> list[str]:
        if value is None:
            return ["-", ""]
        score, error, items = value
        return [f"{score:.4f}" + ("" if error is None else f" ± {error:.4f}"), "" if items is None else str(items)]

    rows = [["task", "metric", "dense", "items", "pruned", "items"]]
    return rows + [[task.task, task.metric, *cells(task.dense), *cells(task.pruned)] for task in tasks]


def _model(report: Mapping[str, Any]) -> str:
    return Path(str(report.get("model", "a model"))).name


def _calibration(report: Mapping[str, Any]) -> str:
    samples, length = report.get("calibration_samples"), report.get("calibration_sequence_length")
    files = report.get("settings", {}).get("calibrate", {}).get("calibration", [])
    of = f" of {', '.join(Path(file).name for file in files)}" if files else ""
    return f"Calibrated on {samples} windows of {length} tokens{of}. {_refinement(report.get('refinement', {}))}"


def _refinement(notes: Mapping[str, Any]) -> str:
    if not notes.get("accepted"):
        return "Nothing was retrained."
    if "held_out_divergence" not in notes:
        return "Then learned further on the same windows, towards the dense model's predictions."
    found = notes["held_out_divergence"]
    return (
        "Then learned further on the same windows, towards the dense model's predictions: on held-out ones the "
        f"divergence from them fell from {found['before']:.4f} to {found['after']:.4f} nats per token."
    )


def _cards(run: Run) -> dict[str, str]:
    report = run.report
    blocks, total = report["block_parameters"], report["total_parameters"]
    facts = {
        "removed from attention and MLP": percent(report["removed_block_fraction"]),
        "removed from the whole model": percent(report["removed_model_fraction"]),
        "parameters": f"{_short(total['dense'])} → {_short(total['pruned'])}",
        "of them in attention and MLP": f"{_short(blocks['dense'])} → {_short(blocks['pruned'])}",
    }
    for found in run.perplexities[:1]:
        if found.dense is not None and found.pruned is not None:
            facts[f"perplexity, {found.text}"] = f"{perplexity_number(found.dense)} → {perplexity_number(found.pruned)}"
    if "seconds" in report:
        facts["time"] = duration(report["seconds"])
    if "peak_rss_bytes" in report:
        facts["peak memory"] = gibibytes(report["peak_rss_bytes"])
    return facts


def _short(count: int) -> str:
    """134515008 as 134.5M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _layer_rows(report: Mapping[str, Any]) -> list[list[str]]:
    head = ["layer", "heads", "KV heads", "query/key width", "value width", "MLP width"]
    rows = [[*head, "attention removed", "MLP removed", "attention error", "MLP error", "solvers", "seconds"]]
    removed = report["removed_by_layer"]
    for i, (layer, dense) in enumerate(zip(report["layers"], report["dense_layers"], strict=True)):
        groups = dense["query_to_kv"]
        widths = [
            (layer["query_heads"], len(groups)),
            (layer["kv_heads"], groups[-1] + 1),
            (layer["qk_head_dim"], dense["qk_head_dim"]),
            (layer["v_head_dim"], dense["v_head_dim"]),
            (layer["intermediate_size"], dense["intermediate_size"]),
        ]
        solvers = dict.fromkeys(layer["notes"].get(name, {}).get("solver", "-") for name in ("attention", "mlp"))
        rows.append(
            [
                str(layer["layer"]),
                *(f"{kept} of {full}" for kept, full in widths),
                *(percent(removed[name][i]) for name in ("attention", "mlp")),
                *(f"{layer[f'{name}_error']:.4f}" for name in ("attention", "mlp")),
                ", ".join(solvers),
                f"{layer['seconds']:.1f}",
            ]
        )
    return rows


def _stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    stages = report["stages"]
    device = any("peak_device_bytes" in stage for stage in stages)
    rows = [["stage", "time", "peak memory so far", *(["of the device"] if device else [])]]
    for stage in stages:
        on_device = [gibibytes(stage.get("peak_device_bytes", 0))] if device else []
        rows.append([stage["stage"], duration(stage["seconds"]), gibibytes(stage["peak_rss_bytes"]), *on_device])
    return rows
