"""`intraslice prune`: a smaller model, written as a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._command_line import command_line
from intraslice_jax.commands._held_out import HeldOut, read_held_out
from intraslice_jax.commands._types import Config, Dtype, Model, Output
from intraslice_jax.config import CalibrationConfig, ParallelConfig, PruneConfig


@dataclass(frozen=True, kw_only=True)
class Options(HeldOut):
    """Prune a model and write the result as a checkpoint, with a page that shows what was done.

    With a held-out text (`--text` or `--dataset`) the perplexity before and after is measured, too.

    Attributes:
        model: a folder, a hub id, a .gguf file, or a checkpoint.
        output: the checkpoint folder to write.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
        dtype: dtype of the weights; as stored if not given.
    """

    model: Model
    output: Output
    config: Config = None
    overwrite: bool = False
    dtype: Dtype | None = None
    prune: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    calibrate: OmitArgPrefixes[CalibrationConfig] = field(default_factory=CalibrationConfig)
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, prunes, saves."""
    from intraslice_jax.io.atomic import check_output

    check_output(options.output, options.overwrite)  # before any heavy import

    from intraslice_jax.prune.methods import create_method

    create_method(options.prune.method)  # a wrong name is found before the model is loaded

    from intraslice_jax import api
    from intraslice_jax.calibrate.sources import read_sources
    from intraslice_jax.commands._output import gibibytes, number, percent, print_table, say
    from intraslice_jax.environment import StageClock, peak_rss_bytes
    from intraslice_jax.evaluate.held_out import measure_both
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.progress import duration, layer_progress
    from intraslice_jax.report.single import write_report
    from intraslice_jax.settings import as_settings

    started, clock = time.monotonic(), StageClock()
    calibrate = options.calibrate
    text = read_sources(calibrate.calibration, calibrate.split, calibrate.column, "--calibration")
    held_out = read_held_out(options) if options.text or options.dataset else None
    model = api.load(options.model, options.dtype, make_mesh(options.parallel.mesh))
    clock.finish("reading")
    with layer_progress(model.config.num_layers) as on_layer:
        pruned = api.prune_calibrated(model, text, options.prune, calibrate, on_layer)
    texts, measuring = {}, StageClock()
    if held_out is not None:
        texts[held_out.name] = measure_both(model, pruned, held_out, calibrate.sequence_length)
        measuring.finish("perplexity")
    report = {
        **pruned.report,
        "texts": texts,
        "stages": [*clock.stages, *pruned.report["stages"], *measuring.stages],
        "command": command_line("prune", options),
        "settings": as_settings(options),
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    api.save(dataclasses.replace(pruned, report=report), options.output, options.overwrite)
    if not write_report(options.output):
        say("matplotlib is not installed, so report.html has no pictures; pip install 'intraslice-jax[report]'")
    dense, small = model.config, pruned.config
    print_table(
        [
            ["", "before", "after", "removed"],
            [
                "block parameters",
                number(dense.block_parameters()),
                number(small.block_parameters()),
                percent(report["removed_block_fraction"]),
            ],
            [
                "all parameters",
                number(dense.total_parameters()),
                number(small.total_parameters()),
                percent(report["removed_model_fraction"]),
            ],
        ]
    )
    for name, found in texts.items():
        print(f"perplexity, {name}: {found['dense_perplexity']:.3f} before, {found['pruned_perplexity']:.3f} after")
    spent = f"{duration(report['seconds'])}, peak memory {gibibytes(report['peak_rss_bytes'])}"
    print(f"{options.output}: written in {spent}; see {options.output / 'report.html'}")
