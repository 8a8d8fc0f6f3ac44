"""Perplexity and loss by position of presets, sparsities, calibration texts and seeds: the tables of docs/quality.md.

    python -m benchmarks.quality MODEL -o results.jsonl --calibration tokens.valid.txt wiki.txt \
        --text tokens.test.txt c4.utf8 technical.utf8 --presets paper quality --sparsity 0.196 0.293 0.487 --seeds 0 1 2

Each run is a line of the file. Those that it holds are not done again, so that an interrupted series goes on; without
runs left to do only the tables are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import intraslice_jax as isl
from intraslice_jax.api import prune_calibrated, text_windows
from intraslice_jax.calibrate.documents import read_files
from intraslice_jax.config import PRESETS, CalibrationConfig, preset
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.model import LanguageModel

KEY: tuple[str, ...] = ("preset", "sparsity", "calibration", "sampling", "seed")
"""What tells one run from the others."""


def main() -> None:
    """Runs what is missing, and prints the tables."""
    options = _options()
    path: Path = options.output
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    model = isl.load(options.model)
    windows = {
        text: text_windows(model, read_files([text]).rendered(model.require_tokenizer()).text, options.length, limit)
        for text, limit in zip(options.text, [16] + [8] * (len(options.text) - 1), strict=True)
    }
    wanted = [("dense", 0.0, "", "", 0)] if "dense" not in [row["preset"] for row in rows] else []
    wanted += itertools.product(
        options.presets, options.sparsity, options.calibration, [options.sampling], options.seeds
    )
    for key in wanted:
        facts: dict[str, Any] = dict(zip(KEY, key, strict=True))
        if any(all(row[name] == value for name, value in facts.items()) for row in rows):
            continue
        rows.append(facts | _run(model, facts, windows, options))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(_line(rows[-1]), flush=True)
    for name, found in itertools.groupby(sorted(rows, key=_group), key=_group):
        print(_summary(name, list(found)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True, help="16 windows of the first, 8 of each other")
    parser.add_argument("--presets", nargs="+", default=["paper", "quality"], choices=PRESETS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.196, 0.293, 0.487])
    parser.add_argument("--sampling", default="documents", choices=("documents", "random"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    return parser.parse_args()


def _run(
    model: LanguageModel, facts: dict[str, Any], windows: dict[str, np.ndarray], options: argparse.Namespace
) -> dict[str, Any]:
    started, cpu = time.monotonic(), time.process_time()
    pruned = model
    if facts["preset"] != "dense":
        config = dataclasses.replace(preset(facts["preset"]), sparsity=facts["sparsity"])
        calibrate = CalibrationConfig(
            samples=options.samples,
            sequence_length=options.length,
            sampling=facts["sampling"],
            seed=facts["seed"],
        )
        text = read_files([facts["calibration"]]).rendered(model.require_tokenizer())
        pruned = prune_calibrated(model, text, config, calibrate)
    spent = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    texts = {Path(text).name: dataclasses.asdict(perplexity(pruned, tokens)) for text, tokens in windows.items()}
    return {**spent, "ratios": pruned.report.get("ratios"), "texts": texts}


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY if name != "seed")


def _line(row: dict[str, Any]) -> str:
    measured = ", ".join(f"{name} {found['perplexity']:.2f}" for name, found in row["texts"].items())
    return f"{[row[name] for name in KEY]}: {measured}; {row['cpu_seconds']:.0f} CPU s"


def _summary(name: tuple[Any, ...], rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, with the range of perplexities and the widest range of a module's ratio."""
    lines = [f"{name}, {len(rows)} seeds, {np.mean([row['cpu_seconds'] for row in rows]):.0f} CPU s"]
    for text in rows[0]["texts"]:
        found = [row["texts"][text] for row in rows]
        values = [one["perplexity"] for one in found]
        bands = {b: np.mean([one["loss_by_position"][b] for one in found]) for b in found[0]["loss_by_position"]}
        by_position = "  ".join(f"{band}: {loss:.3f}" for band, loss in bands.items())
        lines.append(f"  {text}: {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})  {by_position}")
    if len(rows) > 1 and all(row["ratios"] for row in rows):
        ratios = np.asarray([row["ratios"]["attention"] + row["ratios"]["mlp"] for row in rows])
        lines.append(f"  widest range of a ratio: {np.ptp(ratios, axis=0).max():.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
