"""`intraslice compare`: pruning methods side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Fixed, OmitArgPrefixes, Suppress

from intraslice_jax.commands._held_out import HeldOut, read_held_out
from intraslice_jax.commands._types import Config, Dtype, Model, Names, Numbers, Output
from intraslice_jax.config import CalibrationConfig, ParallelConfig, PruneConfig, window_length

if TYPE_CHECKING:
    from intraslice_jax.evaluate.compare import Row


@dataclass(frozen=True)
class Settings(PruneConfig):
    """What all methods share: `PruneConfig` without what is compared."""

    sparsity: Suppress[Fixed[float]] = 0.3
    method: Suppress[Fixed[str]] = "intraslice"
    ratios: Suppress[Fixed[str]] = "uniform"


@dataclass(frozen=True, kw_only=True)
class Options(HeldOut):
    """Prune a model with several methods and print their perplexities in one table.

    All methods see the same calibration windows and are measured on the same evaluation windows. OUT gets
    compare.json, compare.csv and compare.png.

    Attributes:
        model: a folder, a hub id, a .gguf file, or a checkpoint.
        output: the folder to write.
        methods: intraslice, magnitude, wanda_sp, flap, obs, slicegpt; with `+biases` behind it a method gets
            biases to fill (flap+biases is FLAP as its authors use it on Llama).
        sparsity: fractions of the decoder layers' parameters to remove.
        ratios: estimators of the ratios per layer (see `prune`); slicegpt takes none.
        dtype: dtype of the weights; as stored if not given.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
    """

    model: Model
    output: Output
    methods: Names = ("intraslice", "magnitude", "wanda_sp", "flap", "obs", "slicegpt")
    sparsity: Numbers = (0.2, 0.3, 0.5)
    ratios: Names = ("uniform",)
    dtype: Dtype | None = None
    config: Config = None
    overwrite: bool = False
    prune: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    calibrate: OmitArgPrefixes[CalibrationConfig] = field(default_factory=CalibrationConfig)
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, prunes and measures in turn, writes, prints."""
    from intraslice_jax.io.atomic import atomic_folder, check_output

    check_output(options.output, options.overwrite)

    from intraslice_jax import api
    from intraslice_jax.calibrate.data import encode, text_hash
    from intraslice_jax.calibrate.sources import read_sources
    from intraslice_jax.calibrate.windows import calibration_windows
    from intraslice_jax.commands._output import print_table, say, write_json
    from intraslice_jax.environment import peak_rss_bytes
    from intraslice_jax.errors import InputError, RunError
    from intraslice_jax.evaluate.compare import compare, plan_trials, to_csv
    from intraslice_jax.evaluate.plot import plot_rows
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.parallel.distributed import is_first
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.settings import as_settings

    for name in ("sparsity", "method", "ratios"):
        if getattr(options.prune, name) != getattr(Settings(), name):
            raise InputError(f"{name} under prune is one value; compare takes several, as `{_PLURAL[name]}` at the top")
    trials = plan_trials(options.methods, options.sparsity, options.ratios, options.prune)
    calibrate = options.calibrate
    documents = read_sources(calibrate.calibration, calibrate.split, calibrate.column, "--calibration")
    held_out = read_held_out(options)
    model = api.load(options.model, options.dtype, make_mesh(options.parallel.mesh))
    length = window_length(calibrate.sequence_length, model.config.max_position_embeddings)
    tokenizer = model.require_tokenizer()
    text, held_out = documents.rendered(tokenizer), held_out.rendered(tokenizer)
    calibrate = dataclasses.replace(calibrate, sequence_length=length)
    calibration = calibration_windows(tokenizer, text, encode(tokenizer, text.text), calibrate)
    evaluation = api.text_windows(model, held_out.text, length, held_out.windows)

    rows: list[Row] = []
    partial = options.output.with_name(f"{options.output.name}.partial.json")

    def facts() -> dict[str, Any]:
        return {
            "model": model.name,
            "rows": [dataclasses.asdict(row) for row in rows],
            "sequence_length": length,
            "calibration_text_sha256": text_hash(text.text),
            "evaluation_text_sha256": text_hash(held_out.text),
            "evaluation_windows": len(evaluation),
            "settings": as_settings(options),
            "versions": versions(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def on_row(row: Row) -> None:
        rows.append(row)
        say(f"[{len(rows)}/{len(trials) + 1}] {_line(row)}")
        if is_first():
            write_json(partial, facts())  # an interrupted run leaves what it has

    say(f"measuring the dense model and {len(trials)} pruned ones; results so far are in {partial}")
    compare(model, calibration, evaluation, trials, on_row)
    if not is_first():
        return
    rows.sort(key=lambda row: row.sparsity)  # the dense model, then the methods beside each other
    with atomic_folder(options.output, options.overwrite) as folder:
        write_json(folder / "compare.json", facts())
        (folder / "compare.csv").write_text(to_csv(rows), encoding="utf-8")
        title = f"{Path(model.name).name}, windows of {length} tokens"
        if not plot_rows(rows, title, folder / "compare.png"):
            say("matplotlib is not installed, so there is no compare.png; pip install matplotlib")
    partial.unlink()
    print_table([["method", "ratios", "asked", "removed", "of model", "perplexity", "seconds"], *map(_cells, rows)])
    failed = [_line(row) for row in rows if row.error]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(trials)} failed, the others are in {options.output}: {'; '.join(failed)}"
        )


_PLURAL = {"sparsity": "sparsity", "method": "methods", "ratios": "ratios"}


def _line(row: Row) -> str:
    name = " ".join(filter(None, (row.method, row.ratios, f"{row.sparsity:g}" if row.sparsity else "")))
    return f"{name}: {row.error}" if row.error else f"{name}: perplexity {row.perplexity:.2f}"


def _cells(row: Row) -> list[str]:
    from intraslice_jax.commands._output import percent

    removed = [
        "-" if share is None else percent(share) for share in (row.removed_block_fraction, row.removed_model_fraction)
    ]
    asked = f"{row.sparsity:g}" if row.sparsity else "-"
    perplexity = "failed" if row.perplexity is None else f"{row.perplexity:.2f}"
    return [row.method, row.ratios or "-", asked, *removed, perplexity, f"{row.prune_seconds:.0f}"]
