"""`intraslice prune`: a smaller model, written as a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._command_line import command_line
from intraslice_jax.commands._held_out import HeldOut, read_held_out
from intraslice_jax.commands._types import Config, Dtype, Model, Output
from intraslice_jax.config import DEFAULT_PRESET, CalibrationConfig, ParallelConfig, PruneConfig, check_refine
from intraslice_jax.errors import InputError

if TYPE_CHECKING:
    from intraslice_jax.io.journal import Journal


@dataclass(frozen=True, kw_only=True)
class Options(HeldOut):
    """Prune a model and write the result as a checkpoint, with a page that shows what was done.

    With a held-out text (`--text` or `--dataset`) the perplexity before and after is measured, too. Sample texts of
    both models are in the page if the layers stay on the devices of one process.

    Attributes:
        model: a folder, a hub id, a .gguf file, or a checkpoint.
        output: the checkpoint folder to write.
        config: YAML file with any of these options; the command line is stronger.
        preset: settings to begin with, single ones of which other options replace: `fast` does the least, `paper` is
            the paper's method, `quality` the best that is known. For the --method of a baseline it is `fast` if not
            given.
        overwrite: replace OUT if it exists.
        dtype: dtype of the weights; as stored if not given.
        resume: continue an interrupted run of the same command from the journal beside OUT, if there is one.
        journal: do without the folder OUT.journal, which keeps finished layers until OUT is written: an interrupted run
            cannot be continued then (`journal: false` in YAML).
        residency: where the layers are that are not in use: on the devices, in host memory, or in the model's files.
    """

    model: Model
    output: Output
    config: Config = None
    preset: Literal["fast", "paper", "quality"] = DEFAULT_PRESET
    overwrite: bool = False
    dtype: Dtype | None = None
    resume: bool = False
    journal: bool = True
    residency: Literal["device", "host", "disk"] = "device"
    prune: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    calibrate: OmitArgPrefixes[CalibrationConfig] = field(default_factory=CalibrationConfig)
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, prunes, saves; what was done by then outlives an interruption in a journal."""
    from intraslice_jax.io.atomic import check_output

    check_output(options.output, options.overwrite)  # before any heavy import
    _check_journal(options)

    from intraslice_jax.prune.methods import create_method

    create_method(options.prune.method)  # a wrong name is found before the model is loaded

    with _journal(options) as journal:
        _prune(options, journal)


def _prune(options: Options, journal: Journal | None) -> None:
    import jax

    from intraslice_jax import api
    from intraslice_jax.calibrate.sources import read_sources
    from intraslice_jax.commands._output import gibibytes, number, percent, print_table, say
    from intraslice_jax.environment import StageClock, peak_rss_bytes
    from intraslice_jax.evaluate.held_out import measure_both
    from intraslice_jax.evaluate.samples import sample_texts
    from intraslice_jax.io.memory import return_freed_arrays
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.planning.estimate import expected_seconds
    from intraslice_jax.progress import duration, run_progress
    from intraslice_jax.report.schema import VERSION as REPORT_VERSION
    from intraslice_jax.report.single import write_report
    from intraslice_jax.settings import as_settings

    started, clock = time.monotonic(), StageClock()
    calibrate = options.calibrate
    with run_progress() as progress:
        progress.tell("reading", 0, 0)
        documents = read_sources(calibrate.calibration, calibrate.split, calibrate.column, "--calibration")
        held_out = read_held_out(options) if options.text or options.dataset else None
        if options.residency != "device":
            return_freed_arrays()
        model = api.load(options.model, options.dtype, make_mesh(options.parallel.mesh), options.residency)
        text, windows = documents.rendered(model.require_tokenizer()), None
        if held_out is not None:  # a text that is too short is found before the run, not after it
            held_out = held_out.rendered(model.require_tokenizer())
            windows = api.text_windows(model, held_out.text, calibrate.sequence_length, held_out.windows)
        clock.finish("reading")
        progress.expect(expected_seconds(model, options.prune, calibrate, windows))
        pruned = api.prune_calibrated(
            model, text, options.prune, calibrate, progress.on_layer, progress.tell, journal=journal
        )
        texts, measuring = {}, StageClock()
        if held_out is not None and windows is not None:
            told = partial(progress.tell, "perplexity")
            texts[held_out.name] = measure_both(model, pruned, held_out, windows, told)
            measuring.finish("perplexity")
        samples = []
        if options.residency == "device" and jax.process_count() == 1:  # elsewhere each token would move all layers
            samples = sample_texts(model, pruned, partial(progress.tell, "sample texts"))
            measuring.finish("sample texts")
        progress.tell("writing", 0, 0)
        report = {
            "format_version": REPORT_VERSION,
            **pruned.report,
            "texts": texts,
            "samples": samples,
            "stages": [*clock.stages, *pruned.report["stages"], *measuring.stages],
            "command": command_line("prune", options),
            "settings": as_settings(options),
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        api.save(dataclasses.replace(pruned, report=report), options.output, options.overwrite)
    if not write_report(options.output):
        say("matplotlib is not installed, so report.html has no pictures; pip install matplotlib")
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


def _check_journal(options: Options) -> None:
    from intraslice_jax.io.atomic import journal_of

    folder = journal_of(options.output)
    if options.residency == "disk" and not options.journal:
        raise InputError("residency disk keeps finished layers in the journal; leave out --no-journal")
    check_refine(options.prune.refine, options.residency)
    if options.resume and not options.journal:
        raise InputError("--resume needs the journal; leave out --no-journal")
    if folder.exists() and options.journal and not (options.resume or options.overwrite):
        raise InputError(
            f"{folder} is of an interrupted run; continue it with --resume, or start anew with --overwrite"
        )


@contextmanager
def _journal(options: Options) -> Iterator[Journal | None]:
    """The journal of the run, removed when all went well."""
    from intraslice_jax.io.atomic import journal_of
    from intraslice_jax.io.journal import Journal

    if not options.journal:
        yield None
        return
    journal = Journal(journal_of(options.output), anew=options.overwrite and not options.resume)
    try:
        yield journal
        journal.remove()
    finally:
        journal.close()
